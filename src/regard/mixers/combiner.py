"""Combiner: every token is seen, near ones directly and far ones through summaries of their regions."""

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, refuse, whole
from regard.kernels.check import check_inputs
from regard.linear._shared import RecurrentMixer, repeat_heads, widened
from regard.mixers._regions import Pool, Regions, axial, fixed, logsparse, rowmajor
from regard.tracing import as_it_is, exporting

CARD = Card(
    "combiner",
    equation="""of each region R:  f = max of its k,  g = max of its q,  s = sum_{j in R} softmax_j(g . k_j) v_j
p = softmax over q_i . k_j of the tokens j of D_i and q_i . f of the regions R of i together
out_i = sum_j p_j v_j + sum_R p_R s_R
fixed:      D_i = own segment of w tokens,   R = every segment before     (bidirectional: every segment)
logsparse:  D_i = {i},   R = blocks of 2^l that tile 0 .. i-1, one for each binary digit of i that is 1
axial:      D_i = own row up to i, own column above,   R = each other column above, both sides of each row above
rowmajor:   D_i = own row up to i,   R = each row above, of which the token in i's column tells:
            s = r, softmax attention within the row,   f = K LN(x + O r)""",
    papers=(
        Paper(
            "Combiner: Full Attention Transformer with Sparse Computation Cost",
            "Ren et al.",
            2021,
            "2107.05768",
            "abstract; the authors' code (JAX)",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "gqa", "streaming", "compile"},
    traits={"normalised", "nonnegative", "linear_in_values", "head_independent"},
    cost=Cost("2*B*H*D*T*(2*sqrt(T) + 1)", "2*H*D*S/segment + 3*H*D*segment"),
    claim="Full attention at the cost of sparse one: no weight is 0, but far tokens of a region share theirs: "
    "tests/mixers/test_combiner.py::test_far_tokens_share_their_weight, "
    "tests/mixers/test_combiner.py::test_no_square_matrix.",
    differs=(
        "Summaries pool alone: by max, as the JAX code, or by mean or sum, queries and keys alike.",
        "Any length: the last segment may be short. Regions hold real tokens only, where the code knows no padding.",
        "'logsparse' has a level for every binary digit; the code lacks one at T = 2^n + 1, whose last token then sees "
        "itself alone.",
        "With the default segment, the root of the length, the function of a prefix is another: streams and 'the same "
        "for every length' need a number.",
        "'rowmajor' and 'axial' don't stream. 'rowmajor' is not linear in its values, of which its keys are made.",
        "No dropout of the weights. 'logsparse' is exported and traced for one length.",
    ),
    verified="third-party",
    example={"segment": 4},
    defaults={
        "bias": "code",
        "pattern": "ours",
        "segment": "ours, the root of the length",
        "pool": "code, JAX",
    },
)

Pattern = Literal["fixed", "logsparse", "axial", "rowmajor"]


class CombinerState(NamedTuple):
    """The tokens that may yet be in a region, and the regions that are whole."""

    q: Float[Tensor, "B H o D"]
    k: Float[Tensor, "B H o D"]
    v: Float[Tensor, "B H o D"]
    keep: Bool[Tensor, "B 1 o"]
    regions: Regions | None


@checked()
def combiner_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T V"],
    *,
    pattern: Literal["fixed", "logsparse", "axial"] = "fixed",
    segment: int | None = None,
    pool: Pool = "max",
    causal: bool = True,
    keep: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B H T V"]:
    """The patterns without parameters of their own. Scores are scaled by 1 / sqrt(D); `keep` is True at real keys.

    Raises:
        ValueError: what `Combiner` refuses.
    """
    choice("combiner_attention", ("fixed", "logsparse", "axial"), pattern=pattern)
    check_inputs(q, k, v)
    if not causal and pattern != "fixed":
        refuse("combiner_attention", "causal", f"is off, and {pattern!r} looks back", causal, "True, or 'fixed'")
    with as_it_is(q.device):
        (query, key, value), real = _ready(q, k, v, keep)
        w = width(segment, q.shape[2])
        if pattern == "fixed":
            out = fixed(query, key, value, real, w, pool, causal)[0]
        elif pattern == "logsparse":
            out = logsparse(query, key, value, real, pool)
        else:
            out = axial(query, key, value, real, w, pool)
    return out.to(v.dtype)


def _ready(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> tuple[list[Tensor], Bool[Tensor, "B 1 T"]]:
    """Scaled queries, keys and values of all heads, and which are real."""
    B, H, T, D = q.shape
    q, k, v = widened(q, k, v)
    real = q.new_ones(B, T, dtype=torch.bool) if keep is None else keep
    return [q * D**-0.5, repeat_heads(k, H), repeat_heads(v, H)], real[:, None]


def width(segment: int | None, T: int) -> int:
    """Of segments: no more than all tokens."""
    if segment is not None and exporting():
        return segment
    return max(math.ceil(T**0.5) if segment is None else min(segment, T), 1)


@CARD.module
class Combiner(RecurrentMixer):
    """Self-attention in which far tokens are seen by regions, in time T sqrt(T), or T log T with "logsparse".

    Args:
        dim, num_heads, num_kv_heads, head_dim, causal, bias: as of `HeadMixer`.
        pattern: which tokens are seen directly, and what the regions are; only "fixed" may be bidirectional.
        segment: w, tokens of a segment or row; default the root of the number of tokens, rounded up. "logsparse" has
            none. Streams of "fixed" need a number.
        pool: what stands for the queries and for the keys of a region.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
        pattern: Pattern = "fixed",
        segment: int | None = None,
        pool: Pool = "max",
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, causal=causal, bias=bias)
        choice(self, get_args(Pattern), pattern=pattern)
        choice(self, get_args(Pool), pool=pool)
        if segment is not None:
            whole(self, segment=segment)
        if not causal and pattern != "fixed":
            refuse(self, "causal", f"is off, and pattern {pattern!r} looks back", causal, "True, or pattern 'fixed'")
        self.segment = segment
        self.pattern: Pattern = pattern
        self.pool: Pool = pool
        if pattern == "rowmajor":
            width = num_heads * self.head_dim
            self.row_o_proj, self.row_k_proj = nn.Linear(width, dim, bias=bias), nn.Linear(dim, width, bias=bias)
            self.row_norm = nn.LayerNorm(dim, eps=1e-6)

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With "rowmajor" the token travels beside its queries, a part with each head."""
        q, k, v = super().split(x, source)
        if self.pattern == "rowmajor":
            parts = F.pad(x, (0, -self.dim % self.num_heads)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            q = torch.cat([q, parts], -1)
        return q, k, v

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: CombinerState | None
    ) -> tuple[Tensor, CombinerState | None]:
        D, dtype = self.head_dim, q.dtype
        q, x = q[..., :D], q[..., D:].transpose(1, 2).flatten(2)[..., : self.dim]
        past = 0 if state is None else state.k.shape[2]
        (q, k, v), real = _ready(q, k, v, keep)
        if state is not None:
            q, k, v, real = (torch.cat(z, 2) for z in zip(state[:4], (q, k, v, real), strict=True))
        w, earlier = width(self.segment, k.shape[2]), None if state is None else state.regions
        if self.pattern == "axial":
            return axial(q, k, v, real, w, self.pool), None
        if self.pattern == "rowmajor":
            hidden = ~real[:, 0, :, None]  # a row's attention asks from there, too: with nothing that is known of it

            def key_of(value: Tensor) -> Tensor:
                told = self.row_norm(
                    x.masked_fill(hidden, 0) + self.row_o_proj(value.to(dtype).transpose(1, 2).flatten(2))
                )
                return widened(self.row_k_proj(told).unflatten(-1, (self.num_heads, -1)).transpose(1, 2))[0]

            return rowmajor(q.masked_fill(hidden[:, None], 0), k, v, real, w, key_of), None
        if self.pattern == "logsparse":
            out, done, kept = logsparse(q, k, v, real, self.pool, past), 0, earlier
        else:
            out, kept = fixed(q, k, v, real, w, self.pool, self.causal, earlier)
        if state is None:
            return out, None
        if self.pattern == "fixed":
            out, done = out[:, :, past:], k.shape[2] // w * w if self.segment == w else 0
            if kept is not None and k.shape[2] > done:  # the last segment is open
                kept = kept.along(lambda z, axis: z.narrow(axis, 0, z.shape[axis] - 1))
        q, k, v, real = (z[:, :, done:] for z in (q, k, v, real))
        return out, CombinerState(q, k, v, real, kept)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> CombinerState:
        none = torch.zeros(batch_size, self.num_heads, 0, self.head_dim, device=device, dtype=dtype)
        real = torch.zeros(batch_size, 1, 0, dtype=torch.bool, device=device)
        return CombinerState(none, none, none, real, Regions(none, none, real))

    def _check_streams(self) -> None:
        super()._check_streams()
        if self.pattern in ("axial", "rowmajor"):
            refuse(self, "pattern", "has no streaming form", self.pattern, "'fixed' or 'logsparse'")
        if self.pattern == "fixed" and self.segment is None:
            refuse(self, "segment", "follows the length, which a stream does not know", None, "an int")
