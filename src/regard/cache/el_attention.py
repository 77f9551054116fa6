"""EL-attention: decoding attends over the hidden states themselves, so that no key and no value is ever stored.

    e_h = Wk_h^T (Wq_h x + bq_h)                 one query of width M for each head
    a_h = softmax over s of e_h . x_s / sqrt(D)  (q_h . bk_h is the same for every s and drops out)
    out = bo + sum_h Wo_h (Wv_h sum_s a_hs x_s + bv_h)

The same function as multi-head attention, with the key and value projections moved from the S tokens of the past to the
few queries. Yan et al. 2021, "EL-Attention: Memory Efficient Lossless Attention for Generation" (ICML 2021): the
abstract read and the authors' released code followed.

One state of S M numbers serves keys and values of all heads, against 2 S G D of a key/value cache: half for G D = M,
but more once G D < M / 2 (grouped keys). Scores and mixing cost H / G times M / D as much arithmetic a query; a call
with at most G D / H queries still does no more than building keys and values would, and so goes over the hidden
states; a longer one (a prompt, training) builds them, uses them and lets them go. Both give the same numbers.

What changes keys after their projection (rotary positions, key norms) cannot be folded, so there are no such slots.
Differs from the paper: also grouped keys and causal self-attention, several queries at a time.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from regard._former import PLAIN, Card, Cost, Paper, register
from regard.checks import tokens as check_tokens
from regard.kernels import execute
from regard.masks import Mask
from regard.pipeline.kv_cache import KVCache
from regard.pipeline.layer import Attention
from regard.shapes import HeadShape


def fold_keys(q: Float[Tensor, "B H t D"], weight: Float[Tensor, "G D C"]) -> Float[Tensor, "B H t C"]:
    """Queries that score hidden states as q scores their keys: Wk_h^T q."""
    (B, H, t, D), (G, _, C) = q.shape, weight.shape
    return (q.reshape(B, G, H // G * t, D) @ weight).view(B, H, t, C)


def unfold_values(
    r: Float[Tensor, "B H t C1"], weight: Float[Tensor, "G D C"], bias: Float[Tensor, "G D"] | None = None
) -> Float[Tensor, "B H t D"]:
    """Mixed values from mixed hidden states: Wv_h r.

    With a bias r has one column more, the sum of the row's weights: 1, or 0 where a query sees nothing.
    """
    (B, H, t, _), (G, D, C) = r.shape, weight.shape
    if bias is not None:
        weight = torch.cat([weight, bias[..., None]], -1)
        C += 1
    return (r.reshape(B, G, H // G * t, C) @ weight.mT).view(B, H, t, D)


class ELAttention(Attention):
    """Multi-head attention whose streaming state is the hidden states that went in.

    Args:
        dim, num_heads, num_kv_heads, head_dim, causal, bias, context_dim, kernel: as in `regard.Attention`.
        folded: calls with at most so many queries go over the hidden states, longer ones build keys and values;
            default G D / H, up to which that costs no more arithmetic.

    Shapes: x (B, T, M), context (B, S, context_dim) -> (B, T, M). All beams of a sentence can be its T queries.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        folded: int | None = None,
        bias: bool = False,
        context_dim: int | None = None,
        kernel: str = "auto",
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            causal=causal,
            bias=bias,
            context_dim=context_dim,
            kernel=kernel,
        )
        self.folded = self.num_kv_heads * self.head_dim // num_heads if folded is None else folded
        if isinstance(self.folded, bool) or not isinstance(self.folded, int) or self.folded < 0:
            raise ValueError(f"ELAttention: folded must be an int >= 0, got {folded!r}")

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """An empty state: hidden states alone, `x` (B, capacity, M)."""
        keys = super().init_state(batch_size, capacity, device="meta", dtype=dtype).buffers["k"]
        device = self.k_proj.weight.device if device is None else device
        return KVCache({"x": torch.zeros(batch_size, capacity, self.dim, device=device, dtype=keys.dtype)})

    def step(
        self, x: Float[Tensor, "B t M"], state: KVCache, *, mask: Mask | None = None
    ) -> tuple[Float[Tensor, "B t M"], KVCache]:
        """The next t tokens: what `forward` would give at these positions, and the state with them in it."""
        if not self.causal:
            raise ValueError("ELAttention: streaming needs causal=True, this layer sees later tokens; build it causal")
        check_tokens(self._who, "x", x, self.dim)
        if not isinstance(state, KVCache):
            raise TypeError(f"step: state must be the KVCache of init_state, got {type(state).__name__}")
        if mask is not None and not isinstance(mask, Mask):
            raise TypeError(f"step: mask must be a regard.masks.Mask, got {type(mask).__name__}")
        held, state = state.append(x=x)
        where = torch.arange(state.length, device=x.device)
        q, k, v, _, _ = self._project(x, held["x"], where, where, where)
        return self._finish(execute(self._problem(q, k, v, None, None, self._static(mask)), self.kernel), x), state

    def _project(
        self, x: Tensor, source: Tensor, where: Tensor, where_keys: Tensor, turn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries for the hidden states, and these as the one key and value of all heads."""
        if x.shape[1] > self.folded:
            return super()._project(x, source, where, where_keys, turn)
        q = fold_keys(self._split(self.q_proj(x), self.num_heads), self._per_group(self.k_proj.weight))
        hidden = source[:, None].to(q.dtype)  # autocast projects to fewer bits than tokens have
        values = hidden if self.v_proj.bias is None else torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1)
        return q, hidden, values, x, source

    def _finish(self, out: Float[Tensor, "B H t V"], x: Tensor) -> Tensor:
        if x.shape[1] <= self.folded:
            bias = None if self.v_proj.bias is None else self._per_group(self.v_proj.bias)
            out = unfold_values(out, self._per_group(self.v_proj.weight), bias)
        return super()._finish(out, x)

    def _per_group(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (self.num_kv_heads, self.head_dim))


def _build(
    shape: HeadShape,
    *,
    causal: bool,
    folded: int | None = None,
) -> ELAttention:
    return ELAttention(
        shape.dim,
        shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        causal=causal,
        folded=folded,
    )


CARD = register(
    Card(
        name="el_attention",
        family="cache",
        gist="Decoding attends over hidden states; keys and values are never stored.",
        equation="out = sum_h Wo_h Wv_h sum_s a[h,s] x[s];  a[h] = softmax((Wk_h^T Wq_h x[t]) . x[s] / sqrt(D))",
        paper=Paper(
            "EL-Attention: Memory Efficient Lossless Attention for Generation",
            "Yan et al.",
            2021,
            "ICML 2021",
            "abstract; the authors' code",
        ),
        build=_build,
        supports=frozenset({"causal", "bidirectional", "cross", "padding", "mask", "gqa", "streaming", "compile"}),
        traits=PLAIN,
        cost=Cost("2*B*H*T*S*M", "S*M"),
        claim=(
            "The same result as multi-head attention from a smaller state: tests/cache/test_el_attention.py compares "
            "with torch's own layer and counts half of the bytes of a key/value cache."
        ),
        differs=(
            "Grouped keys, causal self-attention and several queries at a time are served too.",
            "Calls with many queries build keys and values for the moment: cheaper, and the same numbers.",
        ),
        verified="third-party",
        example={"folded": 64},
    )
)
