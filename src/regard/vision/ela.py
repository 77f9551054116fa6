"""Efficient local attention: gates of rows and of columns, from strips that a convolution runs along."""

from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, divides, flag, refuse, whole

CARD = Card(
    "ela",
    equation="""h = mean over x of X (C, Y),   v = mean over y of X (C, X)
a = sigmoid(GN(conv(h))),  e = sigmoid(GN(conv(v)))         Y[c, y, x] = X[c, y, x] a[c, y] e[c, x]""",
    papers=(
        Paper(
            "ELA: Efficient Local Attention for Deep Convolutional Neural Networks",
            "Xu, Wan",
            2024,
            "2403.01123",
            "abstract; public copies of one module, whose author is unknown; not the paper's body",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("B*(Y + X)*M*group_width*kernel_size", ""),
    claim="Locates what matters along both axes, without fewer channels in between: a row and a column that differ "
    "open alone: tests/vision/test_ela.py::test_the_gates_locate_a_row_and_a_column.",
    verified="reconstructed",
    example={"norm_groups": 8},
    tries={"norm_groups": 12},
    defaults={
        "kernel_size": "code, a public copy's version B",
        "group_width": "code, a public copy's version B",
        "norm_groups": "code, a public copy's version B",
        "shared": "code, public copies",
    },
)


class Version(TypedDict):
    kernel_size: int
    group_width: int
    norm_groups: int


VERSIONS: dict[str, Version] = {
    "T": {"kernel_size": 5, "group_width": 1, "norm_groups": 32},
    "B": {"kernel_size": 7, "group_width": 1, "norm_groups": 16},
    "S": {"kernel_size": 5, "group_width": 8, "norm_groups": 16},
    "L": {"kernel_size": 7, "group_width": 8, "norm_groups": 16},
}
"""The paper's four, as a public copy lists them: `EfficientLocalAttention(dim, **VERSIONS["S"])`."""


class StripGate(nn.Module):
    """sigmoid(GN(conv(s))) along one axis."""

    def __init__(self, dim: int, kernel_size: int, group_width: int, norm_groups: int) -> None:
        super().__init__()
        groups, padding = dim // group_width, kernel_size // 2
        self.conv = nn.Conv1d(dim, dim, kernel_size, padding=padding, groups=groups, bias=False)
        self.norm = nn.GroupNorm(norm_groups, dim)

    def forward(self, s: Float[Tensor, "B C L"]) -> Float[Tensor, "B C L"]:
        z, norm = self.conv(s), self.norm
        # Not through the module, which refuses a strip of one place; its gate is that of the bias alone.
        return torch.group_norm(z, norm.num_groups, norm.weight, norm.bias, norm.eps).sigmoid()


def strips(x: Float[Tensor, "B C Y X"]) -> tuple[Float[Tensor, "B C Y"], Float[Tensor, "B C X"]]:
    """The means of rows, and of columns."""
    return x.mean(3), x.mean(2)


@CARD.module
class EfficientLocalAttention(nn.Module):
    """Both gates on a map.

    Args:
        dim: C.
        kernel_size: of the convolution along a strip; odd.
        group_width: channels that the convolution mixes; 1 is depthwise.
        norm_groups: of the group norm, whose statistics are of a whole strip.
        shared: one convolution and norm for both axes, as in all known code, or two of each.
    """

    def __init__(
        self, dim: int, *, kernel_size: int = 7, group_width: int = 1, norm_groups: int = 16, shared: bool = True
    ) -> None:
        super().__init__()
        whole(self, dim=dim, kernel_size=kernel_size, group_width=group_width, norm_groups=norm_groups)
        if kernel_size % 2 == 0:
            refuse(self, "kernel_size", "is even", kernel_size, "an odd one, which has a centre")
        divides(self, group_width=group_width, dim=dim)
        divides(self, norm_groups=norm_groups, dim=dim)
        flag(self, shared=shared)
        self.dim, self.shared = dim, shared
        self.rows = StripGate(dim, kernel_size, group_width, norm_groups)
        self.columns = None if shared else StripGate(dim, kernel_size, group_width, norm_groups)

    def gates(self, x: Float[Tensor, "B C Y X"]) -> tuple[Float[Tensor, "B C Y"], Float[Tensor, "B C X"]]:
        """a of the rows and e of the columns, in (0, 1)."""
        h, v = strips(x)
        return self.rows(h), (self.rows if self.columns is None else self.columns)(v)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        if not x.numel():
            return x.clone()
        a, e = self.gates(x)
        return x * a[:, :, :, None] * e[:, :, None]

    def extra_repr(self) -> str:
        return f"{self.dim}, shared={self.shared}"
