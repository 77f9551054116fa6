"""CoPE: positions are counted by content; each query decides which keys count."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import fits, whole
from regard.positions._shared import work_dtype
from regard.stages import Position, Rows

CARD = Card(
    "cope",
    equation="""g[i,j] = sigmoid(q_i . k_j / sqrt(D)) for allowed pairs, else 0
p[i,j] = min(sum_{l >= j} g[i,l], N - 1)                          (causally l runs from j to i)
score[i,j] = q_i . k_j / sqrt(D) + q_i . E[p[i,j]],   linear between the two nearest rows of E (N, D)""",
    papers=(
        Paper(
            "Contextual Position Encoding: Learning to Count What's Important",
            "Golovneva, Wang, Weston, Sukhbaatar",
            2024,
            "2405.18719",
            "the printed listing, as copied by others; official code",
        ),
    ),
    traits=PLAIN - {"position_free"},
    cost=Cost("2*B*H*T*S*D + 2*B*H*T*max_positions*D + 6*B*H*T*S", "2*S*G*D"),
    claim="It can count tokens of one kind exactly, which token positions cannot: "
    "tests/positions/test_cope.py::test_counts_one_kind_of_token.",
    differs=(
        "The position's term isn't divided by sqrt(D), as in the paper's listing; the authors' repository divides it "
        "by default.",
        "Bidirectionally all allowed keys from j to the end are counted.",
    ),
    verified="reconstructed",
    example={"max_positions": 6},
    defaults={"max_positions": "ours, the paper's as remembered"},
)


def contextual_positions(
    scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None
) -> Float[Tensor, "B H t S"]:
    """p: how many keys from j on the query counts, each by its gate; masked keys count 0."""
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.sigmoid().flip(-1).cumsum(-1).flip(-1)


def interpolated_lookup(by_position: Float[Tensor, "B H t N"], p: Float[Tensor, "B H t S"]) -> Float[Tensor, "B H t S"]:
    """by_position at the real-valued places p, linear between whole ones; p beyond the last is the last."""
    by_position = by_position.to(p.dtype)  # autocast may have narrowed it
    p = p.clamp(max=by_position.shape[-1] - 1)
    place = p.detach().nan_to_num(0.0)  # NaN can't be an index; it comes back through `part`
    low, high = place.floor(), place.ceil()
    part = p - low
    return torch.lerp(by_position.gather(-1, low.long()), by_position.gather(-1, high.long()), part)


@CARD.fills("position")
class CoPE(Position):
    """Contextual positions 0 .. max_positions - 1, one table for all heads, which starts at zero.

    Args:
        max_positions: N; what is farther shares the last. 64 is the paper's limit as remembered, not read; the code's
            default is a place for every token.
    """

    sees = "rows"
    needs = frozenset({"scores"})

    def __init__(self, head_dim: int, *, max_positions: int = 64) -> None:
        super().__init__()
        whole(self, head_dim=head_dim)
        whole(self, 2, max_positions=max_positions)
        self.head_dim = head_dim
        self.max_positions = max_positions
        self.table = nn.Parameter(torch.empty(max_positions, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.table)

    def bias(self, rows: Rows) -> Float[Tensor, "B H t S"]:
        fits(self, "B H t D", {"D": self.head_dim}, q=rows.q)
        work = work_dtype(rows.q)
        positions = contextual_positions(rows.scores.to(work), rows.allowed)
        by_position = rows.q.to(work) @ self.table.to(work).T
        return interpolated_lookup(by_position, positions).to(rows.q.dtype)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, max_positions={self.max_positions}"
