"""ShiftViT: attention replaced by moving a few channels one pixel to the left, right, up and down.

    groups of g = M // n_div channels:   left    y[c, y, x] = x[c, y, x + 1]     up      x[c, y + 1, x]
                                         right              x[c, y, x - 1]     down    x[c, y - 1, x]

The rest of the channels stay; zeros come in at the border. No parameters and no multiplications.

2022, https://arxiv.org/abs/2201.10801: abstract read, the authors' released code (microsoft/SPACH) followed.
Differs from the paper: fewer channels than n_div are refused, where the code would move nothing.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.card import Card, Cost, Paper, register
from regard.kinds import HeadShape
from regard.vision.maps import check_map


def shift(x: Float[Tensor, "B C Y X"], *, n_div: int = 12) -> Float[Tensor, "B C Y X"]:
    """Move four groups of C // n_div channels by one pixel each: left, right, up, down."""
    g = x.shape[1] // n_div
    left, right, up, down = x[:, : 4 * g].split(g, 1) if g else [x[:, :0]] * 4
    moved = (
        F.pad(left[..., 1:], (0, 1)),
        F.pad(right[..., :-1], (1, 0)),
        F.pad(up[..., 1:, :], (0, 0, 0, 1)),
        F.pad(down[..., :-1, :], (0, 0, 1, 0)),
    )
    return torch.cat([*moved, x[:, 4 * g :]], 1)


class Shift(nn.Module):
    """`shift` as a layer.

    Args:
        dim: C.
        n_div: 4 / n_div of the channels move.
    """

    def __init__(self, dim: int, *, n_div: int = 12) -> None:
        super().__init__()
        if not 4 <= n_div <= dim:
            raise ValueError(f"Shift: n_div is {n_div}; expected 4 <= n_div <= dim = {dim}, so that four groups fit")
        self.dim, self.n_div = dim, n_div

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        check_map("Shift", x, self.dim)
        return shift(x, n_div=self.n_div)

    def extra_repr(self) -> str:
        return f"{self.dim}, n_div={self.n_div}"


def _build(
    shape: HeadShape,
    *,
    causal: bool,
    n_div: int = 12,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Shift:
    return Shift(shape.dim, n_div=n_div)


CARD = register(
    Card(
        name="shift",
        family="vision",
        gist="Small groups of channels move one pixel left, right, up and down; nothing else.",
        equation="group g of the channels: y[c, p] = x[c, p + e_g], e = left, right, up, down; zeros come in",
        paper=Paper(
            "When Shift Operation Meets Vision Transformer: An Extremely Simple Alternative to Attention Mechanism",
            "Wang, Zhao, Tang, Luo, Zeng",
            2022,
            "2201.10801",
            "abstract; official code",
        ),
        build=_build,
        protocol="FeatureMixer",
        supports=frozenset({"bidirectional", "compile"}),
        cost=Cost("0", ""),
        claim="Zero parameters, zero multiplications; l layers see |dy| + |dx| <= l: tests/vision/test_shift.py.",
        differs=("fewer channels than n_div are refused, where the code would move nothing",),
        verified="third-party",
        example={"n_div": 5},
    )
)
