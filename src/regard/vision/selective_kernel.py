"""Selective kernels: convolutions of several sizes, and a softmax that chooses among them for each channel."""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, divides, whole
from regard.vision.gating import Bottleneck, batch_normed, inner_width, means

CARD = Card(
    "selective_kernel",
    equation="""U_p = relu(BN(conv3x3 with dilation p (x)))            p = 1 .. P: as kernels of 3, 5, ..
a = softmax over p of (W2 relu(BN(W1 mean over places of sum_p U_p)))      for each channel
y = sum_p a_p U_p""",
    papers=(Paper("Selective Kernel Networks", "Li, Wang, Hu, Yang", 2019, "1903.06586", "third-party code"),),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("9*paths*B*Y*X*M*M/groups + B*M*inner_dim*(1 + paths)", ""),
    claim="Each channel sets the size of its kernel by what the map holds: "
    "tests/vision/test_selective_kernel.py::test_content_chooses_the_reach.",
    differs=(
        "Every path sees all channels, as in the formula; timm splits them among the paths unless told otherwise.",
    ),
    verified="third-party",
    example={"inner_dim": 5},
    tries={"reduction": {"inner_dim": None, "reduction": 2}, "groups": 2},
    exceptions={"L10 batch_rows_do_not_meet_in_training": "the authors' batch normalisation reads the whole batch"},
    defaults={
        "paths": "code, timm",
        "groups": "code, timm",
        "reduction": "code, timm",
        "inner_dim": "code, timm: C / reduction as a multiple of 8, never below it",
    },
)


def select(paths: Float[Tensor, "B P C Y X"], weights: Float[Tensor, "B P C"]) -> Float[Tensor, "B C Y X"]:
    """The sum of the paths, by each channel's weights."""
    return (paths * weights[..., None, None]).sum(1)


@CARD.module
class SelectiveKernel(nn.Module):
    """`select` with its convolutions and weights.

    Args:
        dim: C.
        paths: P.
        groups: of the convolutions.
        reduction: C / R, of which R is made as timm does: a multiple of 8.
        inner_dim: R itself.
    """

    def __init__(
        self, dim: int, *, paths: int = 2, groups: int = 1, reduction: float = 16, inner_dim: int | None = None
    ) -> None:
        super().__init__()
        whole(self, dim=dim, paths=paths, groups=groups)
        divides(self, groups=groups, dim=dim)
        self.dim, self.paths = dim, paths
        self.inner_dim = inner_width(self, dim, inner_dim, reduction, multiple=8)
        self.convs = nn.ModuleList(
            nn.Conv2d(dim, dim, 3, padding=p, dilation=p, groups=groups, bias=False) for p in range(1, paths + 1)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in range(paths))
        norm = nn.BatchNorm1d(self.inner_dim)
        self.mlp = Bottleneck(dim, self.inner_dim, out=paths * dim, bias=False, norm=norm)

    def branches(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B P C Y X"]:
        """What the kernels make of the map."""
        found = (F.relu(batch_normed(norm, cast(Tensor, conv(x)))) for conv, norm in zip(self.convs, self.norms))
        return torch.stack(list(found), 1)

    def weights(self, paths: Float[Tensor, "B P C Y X"]) -> Float[Tensor, "B P C"]:
        """How much of each path a channel takes; they sum to 1."""
        scores = self.mlp(means(paths.sum(1))).unflatten(1, (self.paths, self.dim))
        return scores.softmax(1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        paths = self.branches(x)
        return select(paths, self.weights(paths))

    def extra_repr(self) -> str:
        return f"{self.dim}, paths={self.paths}, inner_dim={self.inner_dim}"
