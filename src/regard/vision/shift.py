"""ShiftViT: small groups of channels move one pixel left, right, up and down; nothing else."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, whole

CARD = Card(
    "shift",
    equation="""groups of g = C // n_div channels:   left    y[c, y, x] = x[c, y, x + 1]     up      x[c, y + 1, x]
                                     right              x[c, y, x - 1]     down    x[c, y - 1, x]
the rest of the channels stay; zeros come in at the border""",
    papers=(
        Paper(
            "When Shift Operation Meets Vision Transformer: An Extremely Simple Alternative to Attention Mechanism",
            "Wang, Zhao, Tang, Luo, Zeng",
            2022,
            "2201.10801",
            "abstract; official code (microsoft/SPACH)",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("0", ""),
    claim="Zero parameters, zero multiplications; l layers see |dy| + |dx| <= l: "
    "tests/vision/test_shift.py::test_costs_nothing_and_only_moves, "
    "tests/vision/test_shift.py::test_layers_see_as_far_as_there_are_of_them.",
    differs=("Fewer channels than n_div are refused, where the code would move nothing.",),
    verified="third-party",
    example={"n_div": 5},
    defaults={"n_div": "code"},
)


def shift(x: Float[Tensor, "B C Y X"], *, n_div: int = 12, step: int = 1) -> Float[Tensor, "B C Y X"]:
    """Move four groups of C // n_div channels by one pixel each, or by `step`: left, right, up, down."""
    g, (tall, wide) = x.shape[1] // n_div, (min(step, size) for size in x.shape[2:])
    left, right, up, down = x[:, : 4 * g].split(g, 1) if g else [x[:, :0]] * 4
    moved = (
        F.pad(left[..., wide:], (0, wide)),
        F.pad(right[..., : x.shape[3] - wide], (wide, 0)),
        F.pad(up[..., tall:, :], (0, 0, 0, tall)),
        F.pad(down[..., : x.shape[2] - tall, :], (0, 0, tall, 0)),
    )
    return torch.cat([*moved, x[:, 4 * g :]], 1)


@CARD.module
class Shift(nn.Module):
    """`shift` as a layer.

    Args:
        dim: C.
        n_div: 4 / n_div of the channels move; from 4 to C, so that four groups fit. 12 is the code's default.
    """

    def __init__(self, dim: int, *, n_div: int = 12) -> None:
        super().__init__()
        whole(self, 4, most=dim, n_div=n_div)
        self.dim, self.n_div = dim, n_div

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        return shift(x, n_div=self.n_div)

    def extra_repr(self) -> str:
        return f"{self.dim}, n_div={self.n_div}"
