"""Learned absolute positions: one trained vector for each position, added to the tokens."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import Card, Paper
from regard.checks import checked, refuse, whole
from regard.stages import Position
from regard.tracing import readable

CARD = Card(
    "learned",
    equation="x'_p = x_p + E_p,   E (max_positions, M) trained",
    papers=(
        Paper(
            "Convolutional Sequence to Sequence Learning",
            "Gehring, Auli, Grangier, Yarats, Dauphin",
            2017,
            "1705.03122",
            "not its own text, but the account of it in 1706.03762",
        ),
        Paper("Attention Is All You Need", "Vaswani et al.", 2017, "1706.03762", "section 3.5; table 3 row E"),
    ),
    traits={"normalised", "nonnegative", "head_independent"},
    claim="Knows the positions of its table, and none beyond the trained length: "
    "tests/positions/test_absolute.py::test_learned_refuses_what_the_table_lacks.",
    differs=(
        "Added to the input of this layer; the papers add it once, to the embeddings.",
        "The table starts at N(0, 0.02^2), as in GPT-2 and BERT.",
    ),
    verified="reconstructed",
    example={"max_positions": 64},
    defaults={"max_positions": "ours"},
)


@CARD.fills("position")
class Learned(Position):
    """Adds row p of a table (max_positions, dim) to the token at position p; later positions are refused.

    Args:
        max_positions: how many positions have a vector. The default is this library's.
    """

    def __init__(self, dim: int, *, max_positions: int = 2048) -> None:
        super().__init__()
        whole(self, dim=dim, max_positions=max_positions)
        self.dim = dim
        self.max_positions = max_positions
        self.table = nn.Parameter(torch.empty(max_positions, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=0.02)

    @checked(M="dim")
    def embed(self, x: Float[Tensor, "B T M"], positions: Int[Tensor, "*b T"]) -> Float[Tensor, "B T M"]:
        # Compiled code can't branch on data; there the lookup itself fails out of range.
        if positions.numel() and readable(positions):
            low, high = (int(p) for p in positions.aminmax())
            if low < 0 or high >= self.max_positions:
                expected = f"0 to {self.max_positions - 1}; build it with a larger max_positions"
                refuse(self, "positions", "reach where there is no vector", f"{low} to {high}", expected)
        return x + nn.functional.embedding(positions, self.table).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, max_positions={self.max_positions}"
