"""Learned absolute positions: one trained vector for each position, added to the tokens.

    x'_p = x_p + E_p,   E of shape (max_positions, M)

Gehring et al. 2017, "Convolutional Sequence to Sequence Learning" (arXiv 1705.03122), position embeddings;
Vaswani et al. 2017 (1706.03762), section 3.5, found them as good as sinusoids; BERT and GPT use them.
Differs from the paper: read through Vaswani's account, not in Gehring's own text. E starts at N(0, 0.02^2),
as in GPT-2 and BERT. It is added to the input of this layer; the papers add it once, to the embeddings.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard._former import Card, Cost, Paper, register
from regard.positions._shared import check_int, check_width
from regard.shapes import HeadShape
from regard.stages import Position


class Learned(Position):
    """Adds row p of a table (max_positions, dim) to the token at position p; later positions are refused."""

    def __init__(self, dim: int, max_positions: int = 2048) -> None:
        super().__init__()
        check_int("Learned", "dim", dim)
        check_int("Learned", "max_positions", max_positions)
        self.dim = dim
        self.max_positions = max_positions
        self.table = nn.Parameter(torch.empty(max_positions, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=0.02)

    def embed(self, x: Float[Tensor, "B T M"], positions: Int[Tensor, "*b T"]) -> Float[Tensor, "B T M"]:
        check_width("Learned", "x", x, self.dim)
        # Compiled code can't branch on data; there the lookup itself fails out of range.
        if positions.numel() and not torch.compiler.is_compiling() and not positions.is_meta:
            low, high = (int(p) for p in positions.aminmax())
            if low < 0 or high >= self.max_positions:
                wrong = low if low < 0 else high
                raise ValueError(
                    f"Learned: there is no vector for position {wrong} (got positions {low} to {high}); "
                    f"expected 0 to {self.max_positions - 1}; build it with a larger max_positions"
                )
        return x + nn.functional.embedding(positions, self.table).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, max_positions={self.max_positions}"


def _slots(shape: HeadShape, *, max_positions: int = 2048) -> dict[str, object]:
    return {"position": Learned(shape.dim, max_positions)}


CARD = register(
    Card(
        name="learned",
        family="positions",
        gist="A trained vector for each absolute position is added to the tokens.",
        equation="x'[p] = x[p] + E[p]; E (max_positions, M) is trained",
        paper=Paper(
            "Convolutional Sequence to Sequence Learning",
            "Gehring, Auli, Grangier, Yarats, Dauphin",
            2017,
            "1705.03122",
        ),
        slots=_slots,
        traits=frozenset({"normalised", "nonnegative", "head_independent"}),
        cost=Cost("2*B*H*T*S*D", "2*S*G*D"),
        claim="As good as sinusoids within the trained length (Vaswani 2017, table 3 row E); none beyond it.",
        differs=(
            "Added to the input of this layer; the papers add it once, to the embeddings.",
            "The table starts at N(0, 0.02^2), as in GPT-2 and BERT.",
        ),
        verified="equation",
        example={"max_positions": 64},
    )
)
