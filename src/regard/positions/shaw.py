"""Relative position representations (Shaw): trained vectors for clipped offsets, added to keys and to values.

    r = clip(j - i, -K, K)
    score[i,j] = q_i . (k_j + AK[r]) / sqrt(D)
    out_i      = sum_j a[i,j] (v_j + AV[r])

Shaw, Uszkoreit, Vaswani 2018, "Self-Attention with Relative Position Representations" (arXiv 1803.02155),
section 3. Row r + K of a table holds offset r: keys of the past come first. No (T, S, D) tensor is formed:
q_i . AK is computed for the 2K + 1 offsets and then looked up, and weights are summed by offset before they
meet AV.
Differs from the paper: the term of the scores is scaled by 1/sqrt(D) even where the attention is given
another scale (a position part isn't told of it). Tables start Glorot uniform, as in the authors' code.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard._former import Card, Cost, Paper, register
from regard.positions._shared import check_heads, check_int, check_width, work_dtype
from regard.shapes import HeadShape
from regard.stages import Position, Rows


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
    by_offset = weights.new_zeros(*weights.shape[:-1], table.shape[-2])
    return by_offset.scatter_add(-1, index.expand_as(weights), weights) @ table


class Shaw(Position):
    """Offsets clipped to `max_distance`; one table for all heads, or one each where `num_heads` is given."""

    def __init__(
        self,
        head_dim: int,
        *,
        max_distance: int = 16,
        num_heads: int | None = None,
        value_dim: int | None = None,
    ) -> None:
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        check_int("Shaw", "head_dim", head_dim)
        check_int("Shaw", "max_distance", max_distance, least=0)
        check_int("Shaw", "value_dim", value_dim)
        if num_heads is not None:
            check_int("Shaw", "num_heads", num_heads)
        self.head_dim, self.value_dim = head_dim, value_dim
        self.max_distance = max_distance
        self.num_heads = num_heads
        heads = () if num_heads is None else (num_heads,)
        self.key_table = nn.Parameter(torch.empty(*heads, 2 * max_distance + 1, head_dim))
        self.value_table = nn.Parameter(torch.empty(*heads, 2 * max_distance + 1, value_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in (self.key_table, self.value_table):
            bound = (6 / (table.shape[-2] + table.shape[-1])) ** 0.5  # Glorot, each head's table by itself
            nn.init.uniform_(table, -bound, bound)

    def index(self, rows: Rows) -> Int[Tensor, "t s"]:
        """Which row of the tables each pair uses."""
        offset = rows.j - rows.i.unsqueeze(-1)
        return offset.clamp(-self.max_distance, self.max_distance) + self.max_distance

    def bias(self, rows: Rows) -> Float[Tensor, "B H t s"]:
        check_width("Shaw", "q", rows.q, self.head_dim)
        if self.num_heads is not None:
            check_heads("Shaw", rows.q, self.num_heads)
        q = rows.q.to(work_dtype(rows.q)) * self.head_dim**-0.5
        return relative_scores(q, self.key_table.to(q.dtype), self.index(rows)).to(rows.q.dtype)

    def values(self, weights: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "B H t V"]:
        wide = weights.to(work_dtype(weights))
        return relative_values(wide, self.value_table.to(wide.dtype), self.index(rows)).to(weights.dtype)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, max_distance={self.max_distance}, num_heads={self.num_heads}"


def _slots(shape: HeadShape, *, max_distance: int = 16, per_head: bool = False) -> dict[str, object]:
    heads = shape.num_heads if per_head else None
    return {"position": Shaw(shape.head_dim, max_distance=max_distance, num_heads=heads)}


CARD = register(
    Card(
        name="shaw",
        family="positions",
        gist="Trained vectors for clipped relative offsets are added to keys and to values.",
        equation=("score = q[i].(k[j] + AK[r])/sqrt(D), out[i] = sum_j a[i,j] (v[j] + AV[r]); r = clip(j-i, -K, K)"),
        paper=Paper(
            "Self-Attention with Relative Position Representations",
            "Shaw, Uszkoreit, Vaswani",
            2018,
            "1803.02155",
            "section 3",
        ),
        slots=_slots,
        traits=frozenset({"shift_invariant", "head_independent"}),
        cost=Cost("2*B*H*T*S*D + 2*B*H*T*(2*max_distance+1)*D", "2*S*G*D"),
        claim=(
            "Shifting all positions changes nothing; beyond max_distance equal keys score equally: tests/positions."
        ),
        differs=(
            ("One table for all heads by default, as in the authors' code; per_head=True is the paper's base model."),
            "The scores' term keeps the scale 1/sqrt(D) whatever scale the attention is given.",
        ),
        verified="third-party",
        example={"max_distance": 3},
    )
)
