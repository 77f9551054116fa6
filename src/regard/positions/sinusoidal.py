"""Sinusoidal absolute positions: sines and cosines of geometrically spaced wavelengths, added to the tokens.

    x'_p = x_p + PE_p,   PE[p, 2a] = sin(p * 10000^(-2a/M)),   PE[p, 2a+1] = cos(p * 10000^(-2a/M))

Vaswani et al. 2017, "Attention Is All You Need" (arXiv 1706.03762), section 3.5.
Differs from the paper: the paper adds PE once, at the bottom of the stack; as a part of one layer it is added
to that layer's input. The paper's scaling of the token embeddings by sqrt(M) belongs to the embedding and
isn't done here.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard._former import Card, Cost, Paper, register
from regard.positions._shared import angles, check_above, check_even, check_width, frequencies
from regard.shapes import HeadShape
from regard.stages import Position


def sinusoidal(
    positions: Int[Tensor, "*b T"], dim: int, *, base: float = 10000.0, dtype: torch.dtype | None = None
) -> Float[Tensor, "*b T M"]:
    """The table's rows for these positions, sine and cosine in adjacent channels."""
    angle = angles(positions, frequencies(dim, base, positions.device))
    table = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)
    return table.to(dtype or torch.get_default_dtype())


class Sinusoidal(Position):
    """Adds `sinusoidal(positions)` to tokens of width `dim`. No parameters, no longest position."""

    def __init__(self, dim: int, *, base: float = 10000.0) -> None:
        super().__init__()
        check_even("Sinusoidal", "dim", dim)
        check_above("Sinusoidal", "base", base, 1.0)
        self.dim = dim
        self.base = base

    def embed(self, x: Float[Tensor, "B T M"], positions: Int[Tensor, "*b T"]) -> Float[Tensor, "B T M"]:
        check_width("Sinusoidal", "x", x, self.dim)
        return x + sinusoidal(positions, self.dim, base=self.base, dtype=x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base:g}"


def _slots(shape: HeadShape, *, base: float = 10000.0) -> dict[str, object]:
    return {"position": Sinusoidal(shape.dim, base=base)}


CARD = register(
    Card(
        name="sinusoidal",
        family="positions",
        gist="Fixed sines and cosines of the position are added to the tokens.",
        equation="x'[p] = x[p] + PE[p]; PE[p,2a] = sin(p base^(-2a/M)), PE[p,2a+1] = cos(p base^(-2a/M))",
        paper=Paper("Attention Is All You Need", "Vaswani et al.", 2017, "1706.03762", "section 3.5"),
        slots=_slots,
        traits=frozenset({"normalised", "nonnegative", "head_independent"}),
        cost=Cost("2*B*H*T*S*D", "2*S*G*D"),
        claim="PE at p + k is a linear function of PE at p (section 3.5): tests/positions.",
        differs=("Added to the input of this layer; the paper adds it once, at the bottom of the stack.",),
        verified="equation",
    )
)
