"""Relative positions (Shaw): trained vectors for clipped offsets, added to keys and to values.

Row r + K of a table holds offset r: keys of the past come first. No (T, S, D) tensor is formed: q_i . AK is computed
for the 2K + 1 offsets and then looked up, and weights are summed by offset before they meet AV.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import fits, refuse, whole
from regard.kernels.sums import PIECE, needed
from regard.positions._shared import work_dtype
from regard.stages import Position, Rows

CARD = Card(
    "shaw",
    equation="""score[i,j] = q_i . (k_j + AK[r]) / sqrt(D),   out_i = sum_j a[i,j] (v_j + AV[r])
r = clip(j - i, -K, K)""",
    papers=(
        Paper(
            "Self-Attention with Relative Position Representations",
            "Shaw, Uszkoreit, Vaswani",
            2018,
            "1803.02155",
            "section 3",
        ),
    ),
    traits={"shift_invariant", "head_independent"},
    cost=Cost("2*B*H*T*S*D + 2*B*H*T*(2*max_distance+1)*D", "2*S*G*D"),
    claim="Beyond max_distance equal keys score equally: "
    "tests/positions/test_shaw.py::test_beyond_the_clipping_distance_all_keys_look_the_same.",
    differs=(
        "One table for all heads by default, as in the authors' code; per_head=True is the paper's base model.",
        "The scores' term keeps the scale 1/sqrt(D) even where the attention is given another: a position part isn't "
        "told of it.",
        "Tables start Glorot uniform, as in the authors' code.",
    ),
    verified="third-party",
    example={"max_distance": 3},
    defaults={"max_distance": "paper, base model", "per_head": "paper, big model"},
)


def relative_scores(
    q: Float[Tensor, "B H t D"], table: Float[Tensor, "*h R D"], index: Int[Tensor, "t s"]
) -> Float[Tensor, "B H t s"]:
    """q_i . table[index[i, j]], by way of q_i . table for all R rows."""
    by_offset = q @ table.transpose(-1, -2)
    return by_offset.gather(-1, index.expand(*q.shape[:2], *index.shape))


def relative_values(
    weights: Float[Tensor, "B H t s"], table: Float[Tensor, "*h R V"], index: Int[Tensor, "t s"]
) -> Float[Tensor, "B H t V"]:
    """sum_j weights[i, j] table[index[i, j]], by way of the sums of weights with equal index."""
    index, none = index.expand_as(weights), weights.new_zeros(*weights.shape[:-1], table.shape[-2])
    if not needed(weights):
        return none.scatter_add(-1, index, weights) @ table
    pieces = zip(index.split(PIECE, -1), weights.split(PIECE, -1), strict=True)
    return torch.stack([none.scatter_add(-1, *piece) for piece in pieces]).sum(0) @ table


@CARD.fills("position", closed=("value_dim",))
class Shaw(Position):
    """Offsets clipped to `max_distance`.

    Args:
        head_dim: D.
        num_heads: H; only needed with `per_head`.
        max_distance: K; 16 in the paper's base model.
        per_head: a table for each head, instead of one for all.
        value_dim: V; default D.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int | None = None,
        *,
        max_distance: int = 16,
        per_head: bool = False,
        value_dim: int | None = None,
    ) -> None:
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        whole(self, head_dim=head_dim, value_dim=value_dim)
        whole(self, 0, max_distance=max_distance)
        if num_heads is not None:
            whole(self, num_heads=num_heads)
        elif per_head:
            refuse(self, "num_heads", "is missing", None, "the number of heads, for a table each")
        self.head_dim, self.value_dim = head_dim, value_dim
        self.max_distance = max_distance
        self.num_heads = num_heads if per_head else None
        self.per_head = per_head
        heads = () if self.num_heads is None else (self.num_heads,)
        self.key_table = nn.Parameter(torch.empty(*heads, 2 * max_distance + 1, head_dim))
        self.value_table = nn.Parameter(torch.empty(*heads, 2 * max_distance + 1, value_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in (self.key_table, self.value_table):
            bound = (6 / (table.shape[-2] + table.shape[-1])) ** 0.5  # Glorot, each head's table by itself
            nn.init.uniform_(table, -bound, bound)

    def start_neutral(self) -> bool:
        """All vectors 0, which is plain attention."""
        nn.init.zeros_(self.key_table)
        nn.init.zeros_(self.value_table)
        return True

    def index(self, rows: Rows) -> Int[Tensor, "t s"]:
        """Which row of the tables each pair uses."""
        offset = rows.j - rows.i.unsqueeze(-1)
        return offset.clamp(-self.max_distance, self.max_distance) + self.max_distance

    def bias(self, rows: Rows) -> Float[Tensor, "B H t s"]:
        heads = {} if self.num_heads is None else {"H": self.num_heads}
        fits(self, "B H t D", {"D": self.head_dim, **heads}, q=rows.q)
        q = rows.q.to(work_dtype(rows.q)) * self.head_dim**-0.5
        return relative_scores(q, self.key_table.to(q.dtype), self.index(rows)).to(rows.q.dtype)

    def values(self, weights: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "B H t V"]:
        wide = weights.to(work_dtype(weights))
        return relative_values(wide, self.value_table.to(wide.dtype), self.index(rows)).to(weights.dtype)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, max_distance={self.max_distance}, num_heads={self.num_heads}"
