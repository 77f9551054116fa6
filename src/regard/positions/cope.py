"""CoPE: positions are counted by content; each query decides which keys count."""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import choice, fits, refuse, tokens, whole
from regard.positions._shared import work_dtype
from regard.stages import Made, Position, Rows, Tokens

CARD = Card(
    "cope",
    equation="""g[i,j] = sigmoid(q_i . k_j / sqrt(D)) for allowed pairs, else 0
p[i,j] = min(sum_{l >= j} g[i,l], N - 1)                          (causally l runs from j to i)
score[i,j] = q_i . k_j / sqrt(D) + q_i . E[p[i,j]],   linear between the two nearest rows of E (N, D)
gates: k_j in g is the key; or one of a projection of its own ("own_keys"), or the value v_j ("values")""",
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
        "by default, which is the same with a table sqrt(D) times smaller.",
        "The authors' mix with relative positions, and CoPE in every K-th layer alone, are for the model around it.",
        "Bidirectionally all allowed keys from j to the end are counted.",
    ),
    verified="third-party",
    example={"max_positions": 6},
    defaults={"max_positions": "ours, the paper's as remembered", "gates": "code"},
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


Gates = Literal["keys", "own_keys", "values"]


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
        positions = contextual_positions(self.gate_scores(rows).to(work), rows.allowed)
        by_position = rows.q.to(work) @ self.table.to(work).T
        return interpolated_lookup(by_position, positions).to(rows.q.dtype)

    def gate_scores(self, rows: Rows) -> Float[Tensor, "B H t S"]:
        """What goes through the sigmoid: attention's own scores."""
        return rows.scores

    def extra_repr(self) -> str:
        return f"{self.head_dim}, max_positions={self.max_positions}"


class GatedCoPE(CoPE):
    """Contextual positions whose gates compare queries with other vectors than attention's keys.

    Args:
        head_dim, max_positions: as of `CoPE`.
        dim, num_kv_heads: M and G of a projection of its own, with a bias as in the authors' code; without dim the
            gates read the layer's values.
    """

    needs = frozenset()

    def __init__(
        self, head_dim: int, *, max_positions: int = 64, dim: int | None = None, num_kv_heads: int = 1
    ) -> None:
        super().__init__(head_dim, max_positions=max_positions)
        self.gate_proj = None
        if dim is not None:
            whole(self, dim=dim, num_kv_heads=num_kv_heads)
            self.gate_proj = nn.Linear(dim, num_kv_heads * head_dim)

    def prepare(self, given: Tokens) -> Made:
        if self.gate_proj is None:
            compared = given.v_proj(given.context)
        else:
            tokens(self, "context", given.context, self.gate_proj.in_features)
            compared = self.gate_proj(given.context)
        return Made(key=compared.unflatten(-1, (-1, self.head_dim)).transpose(1, 2))

    def gate_scores(self, rows: Rows) -> Float[Tensor, "B H t S"]:
        compared = rows.made.key
        if compared is None:
            refuse(
                self, "rows", "holds nothing made of the tokens", None, "what prepare gives, as regard.Attention asks"
            )
        heads = rows.q.shape[1] // compared.shape[1]
        return rows.q @ compared.to(rows.q.dtype).repeat_interleave(heads, 1).mT * self.head_dim**-0.5


@CARD.fills("position")
def cope(dim: int, head_dim: int, num_kv_heads: int, *, max_positions: int = 64, gates: Gates = "keys") -> CoPE:
    """Contextual positions with gates of a kind.

    Args:
        dim, head_dim, num_kv_heads: of the layer.
        max_positions: as of `CoPE`.
        gates: what queries are compared with to decide which tokens count: attention's own "keys", "own_keys" of a
            projection that only the gates have, or the "values".
    """
    choice("cope", get_args(Gates), gates=gates)
    if gates == "keys":
        return CoPE(head_dim, max_positions=max_positions)
    own = {"dim": dim, "num_kv_heads": num_kv_heads} if gates == "own_keys" else {}
    return GatedCoPE(head_dim, max_positions=max_positions, **own)
