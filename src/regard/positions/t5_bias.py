"""T5's relative bias: a trained number for each head and each bucket of offsets, wide where far."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import fits, flag, refuse, whole
from regard.positions._shared import work_dtype
from regard.stages import Position, Rows
from regard.weights import Loaded, same

CARD = Card(
    "t5_bias",
    equation="""score[h,i,j] = q_i . k_j / sqrt(D) + table[bucket(j - i), h]
bucket(r) = side + (d where d < e, else min(e + floor(ln(d / e) / ln(L / e) (n - e)), n - 1)),   e = floor(n / 2)
both ways:  n = buckets / 2, d = |r|, side = n where r > 0, else 0
backwards:  n = buckets, d = max(-r, 0), side = 0                                       (L is max_distance)""",
    papers=(
        Paper(
            "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
            "Raffel et al.",
            2019,
            "1910.10683",
            "not its own text, but the authors' Mesh TensorFlow and the form in transformers' T5",
        ),
    ),
    traits=PLAIN - {"position_free"},
    cost=Cost("2*B*H*T*S*D + H*T*S", "2*S*G*D"),
    claim="What is learned on short sequences holds at any length, where far keys share one bucket: "
    "tests/positions/test_t5_bias.py::test_a_fixed_look_back_learned_short_holds_at_length.",
    differs=(
        "T5 doesn't divide by sqrt(D): `regard.Attention(scale=1.0)`, with queries that start as much smaller.",
        "Each layer has its own table, as UMT5's; T5 shares the first layer's with all others of its stack: "
        "`regard.share`.",
        "The table starts normal with standard deviation 1 / sqrt(dim), as in transformers; the authors' code leaves "
        "it to TensorFlow.",
        "Logarithms are in float64 where there is such a thing; both codes have float32. With 32 buckets up to 128 "
        "that makes no difference.",
        "An odd number of buckets for both ways is refused; the codes leave its last row unused.",
        "Left out: a bias projected from the query's token, which the authors' code has besides.",
    ),
    verified="third-party",
    example={"buckets": 8, "max_distance": 6},
    tries={"buckets": 6, "max_distance": 12, "bidirectional": False},
    exceptions={
        "L49 mask_of_a_causal_layer": "a causal layer has other buckets than one that sees all, unless `bidirectional` "
        "is told"
    },
    defaults={"buckets": "code", "max_distance": "code", "bidirectional": "code"},
)


def bucket(
    offset: Int[Tensor, "*n"], *, buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Int[Tensor, "*n"]:
    """Which row of the table an offset j - i uses: near ones have a row each, far ones share.

    Args:
        buckets: rows of the table; even if `bidirectional`, where half of them are for later keys.
        max_distance: L; from there on all keys share the last row of their side. Larger than the distances that have a
            row each.
        bidirectional: whether later keys have rows of their own; else they share that of distance 0.

    Raises:
        TypeError, ValueError: sizes that leave no near or no far bucket.
    """
    n, exact = _sizes("bucket", buckets, max_distance, bidirectional)
    distance = offset.abs() if bidirectional else (-offset).clamp(min=0)
    wide = torch.float32 if offset.device.type == "mps" else torch.float64
    ratio = distance.clamp(min=exact).to(wide) / exact
    far = exact + (ratio.log() / math.log(max_distance / exact) * (n - exact)).long()
    found = torch.where(distance < exact, distance, far.clamp(max=n - 1))
    return found + n * (offset > 0) if bidirectional else found


def _sizes(who: object, buckets: int, max_distance: int, bidirectional: bool) -> tuple[int, int]:
    """(n, e): rows of one side, and those of them that stand for one distance."""
    flag(who, bidirectional=bidirectional)
    whole(who, 4 if bidirectional else 2, buckets=buckets)
    if bidirectional and buckets % 2:
        refuse(who, "buckets", "is odd", buckets, "an even number, half of it for each side")
    n = buckets // 2 if bidirectional else buckets
    whole(who, max_distance=max_distance)
    if max_distance <= n // 2:
        where = f"is no farther than the near ones of buckets = {buckets}"
        refuse(who, "max_distance", where, max_distance, f"an int > {n // 2}")
    return n, n // 2


@CARD.fills("position")
class T5Bias(Position):
    """Adds a trained number to each score, found by the key's offset from the query.

    Args:
        dim: M; the table starts normal with standard deviation 1 / sqrt(M).
        num_heads: H.
        causal: only the default of `bidirectional`.
        buckets: rows of the table.
        max_distance: L; from there on all keys of a side share a row.
        bidirectional: whether later keys have rows of their own; default, where the layer isn't causal.
    """

    by_distance = True
    tied = ("table",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = False,
        *,
        buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool | None = None,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads)
        bidirectional = not causal if bidirectional is None else bidirectional
        _sizes(self, buckets, max_distance, bidirectional)
        self.dim, self.num_heads = dim, num_heads
        self.buckets, self.max_distance, self.bidirectional = buckets, max_distance, bidirectional
        self.table = nn.Parameter(torch.empty(buckets, num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=self.dim**-0.5)

    def start_neutral(self) -> bool:
        """All numbers 0, which is plain attention."""
        nn.init.zeros_(self.table)
        return True

    def bias(self, rows: Rows) -> Float[Tensor, "1 H t s"]:
        fits(self, "B H t D", {"H": self.num_heads}, q=rows.q)
        sizes: dict[str, Any] = {"buckets": self.buckets, "max_distance": self.max_distance}
        index = bucket(rows.j - rows.i.unsqueeze(-1), bidirectional=self.bidirectional, **sizes)
        table = self.table.to(work_dtype(rows.q))
        return nn.functional.embedding(index, table).movedim(-1, 0).to(rows.q.dtype).unsqueeze(0)

    def extra_repr(self) -> str:
        sizes = f"buckets={self.buckets}, max_distance={self.max_distance}"
        return f"{self.num_heads}, {sizes}, bidirectional={self.bidirectional}"


@CARD.loads(
    "transformers",
    *("T5Attention", "MT5Attention", "UMT5Attention", "LongT5Attention", "SwitchTransformersAttention"),
    "Pop2PianoAttention",
)
def _t5(theirs: Any) -> Loaded | None:
    """Only layers that hold a table: the others of a stack are handed what the first one makes, and cross-attention
    has none. Theirs looks at `is_decoder`, not at the mask, for the kind of buckets."""
    if not theirs.has_relative_attention_bias:
        return None
    options = {
        "buckets": theirs.relative_attention_num_buckets,
        "max_distance": theirs.relative_attention_max_distance,
        "bidirectional": not theirs.is_decoder,
    }
    moves = same(theirs, {"position.table": "relative_attention_bias.weight"})
    return Loaded(lambda: T5Bias(theirs.d_model, theirs.n_heads, **options), moves)
