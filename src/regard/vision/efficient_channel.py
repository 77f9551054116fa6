"""ECA, efficient channel attention: a channel's gate is made of the means of a few channels beside it."""

import math
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, refuse, whole
from regard.vision.gating import MapGate, means

CARD = Card(
    "eca",
    equation="""y = x sigmoid(conv1d_k(m))      m the mean of each channel; one kernel for all, no bias
k = max(3, odd),  t = int(|log2 C + 1| / 2),  k = t if odd else t + 1""",
    papers=(
        Paper(
            "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
            "Wang, Wu, Zhu, Li, Zuo, Hu",
            2020,
            "1910.03151",
            "third-party code",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("B*M*kernel", ""),
    claim="k parameters, and a gate that k channels beside its own decide: "
    "tests/vision/test_efficient_channel.py::test_a_gate_reads_k_channels.",
    verified="third-party",
    example={"kernel": 3},
    tries={"kernel": 5},
    defaults={"kernel": "code, timm: of C, see above", "border": "code, timm"},
)


def kernel_size(dim: int) -> int:
    """3 for 16 to 64 channels, 5 for 128 to 1024."""
    t = int(abs(math.log2(dim) + 1) / 2)
    return max(3, t if t % 2 else t + 1)


@CARD.module
class EfficientChannelAttention(MapGate):
    """A gate for each channel.

    Args:
        dim: C.
        kernel: k, odd; default `kernel_size(dim)`.
        border: what stands beyond the first and last channel, zeros or, timm's own variant, the other end.
    """

    def __init__(self, dim: int, *, kernel: int | None = None, border: Literal["zeros", "circular"] = "zeros") -> None:
        super().__init__()
        whole(self, dim=dim)
        choice(self, ("zeros", "circular"), border=border)
        size = kernel_size(dim) if kernel is None else kernel
        whole(self, kernel=size)
        if size % 2 == 0:
            refuse(self, "kernel", "is even", size, "an odd one, which has a centre")
        if border == "circular" and size // 2 > dim:
            refuse(self, "kernel", "goes round more than once", size, f"at most {2 * dim + 1}")
        self.dim, self.kernel, self.border = dim, size, border
        self.conv = nn.Conv1d(1, 1, size, bias=False)

    def gate(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C 1 1"]:
        side = (self.kernel // 2,) * 2
        m = F.pad(means(x)[:, None], side, mode="circular" if self.border == "circular" else "constant")
        return self.conv(m)[:, 0, :, None, None].sigmoid()

    def extra_repr(self) -> str:
        return f"{self.dim}, border={self.border!r}"
