"""Disentangled attention (DeBERTa): contents meet contents, and each meets the other's relative place."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import choice, fits, flag, refuse, whole
from regard.positions._shared import work_dtype
from regard.positions.shaw import relative_scores
from regard.shapes import head_shape
from regard.stages import Made, Position, Rows, Tokens

CARD = Card(
    "disentangled",
    equation="""score[i,j] = (q_i . k_j + q_i . K[t] + k_j . Q[t]) / sqrt(c D),   c: how many terms these are
t = clip(b(i - j) + n, 0, 2 n - 1),   K = P W_k,  Q = P W_q,   P (2 n, M) trained
b(r) = r, n = span;   with buckets n = buckets, m = n / 2 and
b(r) = r where |r| <= m, else sign(r) (m + ceil(ln(|r| / m) / ln((span - 1) / m) (m - 1)))""",
    papers=(
        Paper(
            "DeBERTa: Decoding-enhanced BERT with Disentangled Attention",
            "He, Liu, Gao, Chen",
            2020,
            "2006.03654",
            "abstract; official code of the first release, and its buckets; the form in transformers' DeBERTa v2",
        ),
    ),
    traits=PLAIN - {"position_free"},
    cost=Cost("2*B*H*T*S*D + 2*B*H*(T+S)*span*D + 4*span*M*H*D", "2*S*G*D"),
    claim="Which place counts may depend on what the key is as well as on what the query is: "
    "tests/positions/test_disentangled.py::test_a_key_may_say_from_where_it_is_seen.",
    differs=(
        "The place of k_j's term is i - j, as both codes have it; the paper is said to print j - i, which is another "
        "order of rows.",
        "The terms of places keep the scale 1 / sqrt(c D) even where the attention is given another: a position part "
        "isn't told of it.",
        "Each layer has its own P; the paper's layers share one: `regard.share`. What v2 does to it before, a layer "
        "norm, and dropout are the model's.",
        "Maps are the layer's own, with biases as it has them; the models have biases: `bias=True`.",
        "A ratio of logarithms within 1e-9 of a whole number counts as that number.",
        "Left out: absolute positions in the last layers, which are the model's, and the term of two places, which the "
        "paper drops.",
    ),
    verified="third-party",
    example={"span": 4},
    tries={"buckets": 2},
    defaults={
        "span": "code",
        "buckets": "code, the first release",
        "terms": "code",
        "share": "code, v2",
    },
)

Terms = Literal["both", "c2p", "p2c"]
Project = Callable[[Tensor], Tensor]


class Placed(NamedTuple):
    """The table as keys and as queries; None for a term that is left out."""

    keys: Float[Tensor, "H R D"] | None
    queries: Float[Tensor, "H R D"] | None


def place_terms(
    q: Float[Tensor, "B H t D"], k: Float[Tensor, "B H s D"], placed: Placed, index: Int[Tensor, "t s"]
) -> Float[Tensor, "B H t s"]:
    """q_i . K[index[i, j]] + k_j . Q[index[i, j]], by way of products with all R rows."""
    found = []
    if placed.keys is not None:
        found.append(relative_scores(q, placed.keys, index))
    if placed.queries is not None:
        found.append(relative_scores(k, placed.queries, index.T).mT)
    return sum(found[1:], found[0])


def log_bucket(offset: Int[Tensor, "*n"], buckets: int, span: int) -> Int[Tensor, "*n"]:
    """b(r): offsets up to m = buckets / 2 as they are, larger ones in steps that widen, m - 1 of them up to span - 1.

    Raises:
        TypeError, ValueError: sizes that leave nothing to be widened.
    """
    _sizes("log_bucket", span, buckets)
    middle, distance = buckets // 2, offset.abs()
    wide = torch.float32 if offset.device.type == "mps" else torch.float64
    ratio = distance.clamp(min=middle).to(wide) / middle
    last = ratio.new_tensor((span - 1) / middle)
    steps = (ratio.log() / last.log() * (middle - 1) - 1e-9).ceil().long()
    return torch.where(distance <= middle, offset, offset.sign() * (middle + steps))


def _sizes(who: object, span: int, buckets: int | None) -> int:
    """n: how many rows of the table stand for each side."""
    whole(who, span=span)
    if buckets is None:
        return span
    whole(who, 2, buckets=buckets)
    if buckets % 2:
        refuse(who, "buckets", "is odd", buckets, "an even number, half of it for offsets that have a row each")
    if span - 1 <= buckets // 2:
        refuse(who, "span", f"is no farther than buckets = {buckets} tell apart", span, f"an int > {buckets // 2 + 1}")
    return buckets


@CARD.fills("position")
class Disentangled(Position):
    """The terms of relative places, and the scale that they share with the dot product.

    Args:
        dim, num_heads, head_dim, num_kv_heads: M, H, D and G of the layer.
        span: the largest distance that is told apart; the table has rows for -span to span - 1.
        buckets: rows for each side of a table in which far offsets share; None: all have their own.
        terms: "c2p", the query's content at the key's place; "p2c", the key's content at the query's place; or both.
        share: whether the table goes through the layer's own projections; else it has maps of its own.
    """

    needs = frozenset({"scores"})
    tied = ("table",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        *,
        span: int = 512,
        buckets: int | None = None,
        terms: Terms = "both",
        share: bool = True,
    ) -> None:
        super().__init__()
        shape = head_shape(dim, num_heads, num_kv_heads, head_dim, who=type(self).__name__)
        flag(self, share=share)
        choice(self, get_args(Terms), terms=terms)
        self.rows = _sizes(self, span, buckets)
        self.dim, self.num_heads, self.num_kv_heads, self.head_dim = dim, num_heads, shape.num_kv_heads, shape.head_dim
        self.span, self.buckets, self.terms, self.share = span, buckets, terms, share
        self.table = nn.Parameter(torch.empty(2 * self.rows, dim))
        self.key_map = self.query_map = None
        if not share and terms != "p2c":
            self.key_map = nn.Linear(dim, self.num_kv_heads * self.head_dim)
        if not share and terms != "c2p":
            self.query_map = nn.Linear(dim, num_heads * self.head_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.02, as all weights of the models; biases 0."""
        nn.init.normal_(self.table, std=0.02)
        for own in (self.key_map, self.query_map):
            if own is not None:
                nn.init.normal_(own.weight, std=0.02)
                nn.init.zeros_(own.bias)

    def prepare(self, given: Tokens) -> Made:
        """The table through the layer's projections, or through its own, once a call."""
        keys, queries = (given.k_proj, given.q_proj) if self.share else (self.key_map, self.query_map)
        wanted = (None if self.terms == "p2c" else keys, None if self.terms == "c2p" else queries)
        return Made(whole=Placed(*(None if project is None else self._heads(project) for project in wanted)))

    def _heads(self, project: Project) -> Float[Tensor, "H R D"]:
        rows = project(self.table).unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
        return rows.repeat_interleave(self.num_heads // len(rows), 0)

    def index(self, rows: Rows) -> Int[Tensor, "t s"]:
        """Which row of the table each pair uses."""
        offset = rows.i.unsqueeze(-1) - rows.j
        if self.buckets is not None:
            offset = log_bucket(offset, self.buckets, self.span)
        return (offset + self.rows).clamp(0, 2 * self.rows - 1)

    def bias(self, rows: Rows) -> Float[Tensor, "B H t s"]:
        """The terms of places, and what makes the scale of the dot product theirs."""
        fits(self, "B H t D", {"H": self.num_heads, "D": self.head_dim}, q=rows.q)
        if rows.made.whole is None:
            wanted = "what prepare gives, as regard.Attention asks"
            refuse(self, "rows", "holds nothing made of the tokens", None, wanted)
        work, parts = work_dtype(rows.q), 3 if self.terms == "both" else 2
        wide = Placed(*(None if z is None else z.to(work) for z in rows.made.whole))
        q = rows.q.to(work) * (parts * self.head_dim) ** -0.5
        k = rows.k.to(work) * (parts * self.head_dim) ** -0.5
        terms = place_terms(q, k.repeat_interleave(self.num_heads // k.shape[1], 1), wide, self.index(rows))
        return (terms + (parts**-0.5 - 1) * rows.scores.to(work)).to(rows.q.dtype)

    def extra_repr(self) -> str:
        sizes = f"{self.dim}, {self.num_heads}, span={self.span}, buckets={self.buckets}"
        return f"{sizes}, terms={self.terms!r}, share={self.share}"
