"""Sinusoidal absolute positions: sines and cosines of geometric wavelengths, added to the tokens."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.cards import Card, Paper
from regard.checks import checked, divides, number, whole
from regard.positions._shared import angles, frequencies
from regard.stages import Position

CARD = Card(
    "sinusoidal",
    equation="x'_p = x_p + PE_p,   PE[p, 2a] = sin(p base^(-2a/M)),   PE[p, 2a+1] = cos(p base^(-2a/M))",
    papers=(Paper("Attention Is All You Need", "Vaswani et al.", 2017, "1706.03762", "section 3.5"),),
    traits={"normalised", "nonnegative", "head_independent"},
    claim="PE at p + k is a linear function of PE at p (section 3.5): "
    "tests/positions/test_absolute.py::test_an_offset_is_one_linear_map.",
    differs=(
        "Added to the input of this layer; the paper adds it once, at the bottom of the stack.",
        "The paper's scaling of the token embeddings by sqrt(M) belongs to the embedding and isn't done here.",
    ),
    defaults={"base": "paper"},
)


def sinusoidal(
    positions: Int[Tensor, "*b T"], dim: int, *, base: float = 10000.0, dtype: torch.dtype | None = None
) -> Float[Tensor, "*b T M"]:
    """The table's rows for these positions, sine and cosine in adjacent channels."""
    angle = angles(positions, frequencies(dim, base, positions.device))
    table = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)
    return table.to(dtype or torch.get_default_dtype())


@CARD.fills("position")
class Sinusoidal(Position):
    """Adds `sinusoidal(positions)` to tokens of width `dim`. No parameters, no longest position.

    Args:
        dim: M, even.
        base: the longest wave is 2 pi times so long; the paper's 10000.
    """

    def __init__(self, dim: int, *, base: float = 10000.0) -> None:
        super().__init__()
        whole(self, dim=dim)
        divides(self, pair=2, dim=dim)
        number(self, above=1, base=base)
        self.dim = dim
        self.base = base

    @checked(M="dim")
    def embed(self, x: Float[Tensor, "B T M"], positions: Int[Tensor, "*b T"]) -> Float[Tensor, "B T M"]:
        return x + sinusoidal(positions, self.dim, base=self.base, dtype=x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base:g}"
