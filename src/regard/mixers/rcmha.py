"""Relative attention with a table of distances, behind short convolutions on queries, keys, values."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import FEATURES, Card, Cost, Paper
from regard.checks import fits, flag, refuse, tokens, whole
from regard.heads.short_conv import ShortConv
from regard.kernels import Problem, execute
from regard.kernels.problem import dots
from regard.masks import Mask, padding
from regard.pipeline import nearby
from regard.pipeline.layer import Attention
from regard.pipeline.tokens import key_mask, quarantine, spoil
from regard.stages import Made, Position, Rows
from regard.tracing import exporting

CARD = Card(
    "rcmha",
    equation="""z_t <- c + sum_{n < K} w_n * z_{t-n}   for z in q, k, v;   w_n, c in R^D of each, shared by heads
score[i,j] = (q_i . k_j + u_h . k_j + q_i . E_h[j-i] + b_h[j-i]) / sqrt(D)
y = softmax(score) v;   keys and values are of memory and tokens, queries of the tokens; zeros before each""",
    papers=(
        Paper(
            "RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling",
            "Sugiharto, Aradea, Mubarok",
            2023,
            "2308.03429",
            "abstract; official code",
        ),
    ),
    supports=FEATURES - {"cross"},
    lacks={"cross": "the tokens of a context stand in no order with those that ask"},
    traits={"shift_invariant"},
    cost=Cost("4*B*H*T*S*D + kernel_size*B*(H*T + 2*G*S)*D", "2*S*G*D + S*M"),
    claim="One layer looks up what followed a token when it was seen before, which needs the token before each: "
    "tests/mixers/test_rcmha.py::test_one_layer_looks_up_what_followed.",
    differs=(
        'The abstract convolves "the input embedding"; the code, and this, what the heads project.',
        "Tokens that a mask hides count as zeros in the convolutions; in the code they reach their neighbours.",
        "A stream keeps the tokens that are read, so it is the whole pass; `memory`, the code's segments, is not: the "
        "first queries of a segment read zeros where the memory ends.",
        "Distances beyond the table are refused, where the code's slice shrinks. Grouped keys are ours.",
        "With `memory` come padding masks alone, over memory and tokens.",
        "A query that sees nothing gives the output's bias; the code gives NaN.",
        "Memory use, which the abstract reports, is not claimed: the code has no reason for it.",
    ),
    verified="third-party",
    example={"max_distance": 256, "bias": False},  # with a bias, what sees nothing gives that
    tries={"kernel_size": 2},
    defaults={"kernel_size": "code", "max_distance": "code", "bias": "code"},
)


class SharedConv(ShortConv):
    """A short causal convolution on queries, keys and values, with one kernel and bias for all heads of each."""

    def __init__(self, head_dim: int, *, kernel_size: int = 3) -> None:
        super().__init__(head_dim, 1, kernel_size=kernel_size, bias=True)

    def reset_parameters(self) -> None:
        """As torch's Conv1d."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(self.kernel_size**-0.5), self.kernel_size**-0.5)


class RelativeTable(Position):
    """Transformer-XL's relative terms from a trained table of distances: all 0 at the start.

    Row P + j - i of the tables is of key j for query i; `u` is what every query adds.

    Args:
        head_dim, num_heads: D and H.
        max_distance: P; queries reach P keys back and P - 1 ahead.
    """

    def __init__(self, head_dim: int, num_heads: int, *, max_distance: int = 4096) -> None:
        super().__init__()
        whole(self, head_dim=head_dim, num_heads=num_heads, max_distance=max_distance)
        self.head_dim, self.num_heads, self.max_distance = head_dim, num_heads, max_distance
        self.table = nn.Parameter(torch.empty(2 * max_distance, num_heads, head_dim))
        self.table_bias = nn.Parameter(torch.empty(2 * max_distance, num_heads))
        self.u = nn.Parameter(torch.empty(num_heads, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def start_neutral(self) -> bool:
        """Zeros, which is plain attention."""
        self.reset_parameters()
        return True

    def near(self, back: int, ahead: int) -> tuple[Tensor, Tensor, int]:
        """The tables' rows from `back` keys back to `ahead` ahead, by heads, and the row of distance 0 in them.

        Raises:
            ValueError: distances beyond the tables.
        """
        P = self.max_distance
        if back > P or ahead >= P:
            refuse(self, "max_distance", "is less than tokens are apart", P, f"at least {max(back, ahead + 1)}")
        here = slice(P - back, P + ahead + 1)
        return self.table[here].transpose(0, 1), self.table_bias[here].T, back

    def bias(self, rows: Rows) -> Float[Tensor, "B H t s"]:
        fits(self, "B H t D", {"H": self.num_heads, "D": self.head_dim}, q=rows.q)
        P = self.max_distance
        table, own, zero = self.near(P, P - 1) if rows.made.whole is None else rows.made.whole
        wide = torch.promote_types(rows.q.dtype, torch.float32)
        q, k, table, own, u = (z.to(wide) for z in (rows.q, rows.k, table, own, self.u))
        by_distance = q @ table.mT + own[:, None]
        index = zero + rows.j - rows.i.unsqueeze(-1)
        if rows.made.whole is not None:
            index = index.clamp(0, table.shape[1] - 1)  # what is clamped is masked
        added = by_distance.gather(-1, index.expand(*q.shape[:2], *index.shape))
        added = added + dots(u[None, :, None].expand(len(q), -1, -1, -1), k)
        return (added * self.head_dim**-0.5).to(rows.q.dtype)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, {self.num_heads}, max_distance={self.max_distance}"


@CARD.module(closed=("kernel",))
class RelativeConvAttention(Attention):
    """Attention whose heads' queries, keys and values are convolved along tokens, with relative positions.

    Source: https://arxiv.org/abs/2308.03429, and the authors' code.

    Args:
        dim, num_heads, num_kv_heads, head_dim, causal, dropout, kernel: as in `regard.Attention`. Bidirectional layers
            convolve the past alone, too.
        kernel_size: K, the token itself included.
        max_distance: P; tokens must not stand farther apart.
        bias: whether the projections of values and outputs have one; those of queries and keys have none.

    Shapes: x (B, T, M), memory (B, R, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kernel_size: int = 3,
        max_distance: int = 4096,
        bias: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
        kernel: str = "auto",
    ) -> None:
        sizes: dict[str, Any] = {"num_kv_heads": num_kv_heads, "head_dim": head_dim}
        super().__init__(dim, num_heads, causal=causal, dropout=dropout, kernel=kernel, **sizes)
        flag(self, bias=bias)
        if bias:
            self.v_proj = nn.Linear(dim, self.num_kv_heads * self.head_dim)
            self.o_proj = nn.Linear(num_heads * self.head_dim, dim)
        self.heads: SharedConv = SharedConv(self.head_dim, kernel_size=kernel_size)  # it reads the past in any case
        self.position = RelativeTable(self.head_dim, num_heads, max_distance=max_distance)

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S M"] | None = None,
        *,
        mask: Mask | Bool[Tensor, "#B #H T S"] | None = None,
        positions: Int[Tensor, "*b T"] | None = None,
        memory: Float[Tensor, "B R M"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Attend to these tokens and to those of `memory` before them, all of which are seen.

        Args:
            mask, positions: as in `regard.Attention`; with a memory, `masks.padding` over memory and tokens.
            memory: the tokens just before, such as the last segment's, detached.

        Raises:
            ValueError: a context, other masks beside a memory, or tokens farther apart than `max_distance`.
        """
        if memory is None:
            return super().forward(x, context, mask=mask, positions=positions)
        if context is not None:
            refuse(self, "context", "is not taken", type(context).__name__, "none")
        tokens(self, "x", x, self.dim)
        tokens(self, "memory", memory, self.dim)
        if len(memory) != len(x):
            refuse(self, "memory", "has another batch than x", len(memory), f"{len(x)} sequences")
        source, R = torch.cat([memory.to(x.dtype), x], 1), memory.shape[1]
        keep, packed = key_mask(self, mask, source)
        if packed is not None:
            refuse(self, "mask", "packs documents beside a memory", "masks.packed", "one document a row")
        source, bad = quarantine(source)
        shown = None if keep is None else padding(keep)
        reach, device = self._reach(), x.device
        q = self._split(self.q_proj(source[:, R:]), self.num_heads)
        k, v = (self._split(proj(source), self.num_kv_heads) for proj in (self.k_proj, self.v_proj))
        of_keys = nearby.sees(shown, reach, 0, source.shape[1], device)
        q = self.heads.convolved("q", q, 0, nearby.sees(shown, reach, R, x.shape[1], device))
        k, v = (self.heads.convolved(name, z, 0, of_keys) for name, z in (("k", k), ("v", v)))
        allowed = self._static(shown)
        out = self._finish(execute(self._problem(q, k, v, None, None, allowed), self.kernel), x)
        bad = nearby.spread(bad, of_keys, reach)
        return spoil(out, None if bad is None else bad[:, R:], bad, allowed)

    def _problem(self, q: Tensor, k: Tensor, *rest: Any, **more: Any) -> Problem:
        """With the rows of the tables that these tokens can need."""
        p = super()._problem(q, k, *rest, **more)
        if exporting() or not isinstance(self.position, RelativeTable):  # the graph is for all lengths
            return p
        T, S = q.shape[2], k.shape[2]
        near = self.position.near(max(S - 1, 0), 0 if self.causal else max(T - 1, 0))
        return replace(p, made={**(p.made or {}), "position": Made(whole=near)})
