"""EL-attention: decoding attends over hidden states, so that keys and values are never stored.

The same function as multi-head attention, with the key and value projections moved from the S tokens of the past to
the few queries. One state of S M numbers serves keys and values of all heads, against 2 S G D of a key/value cache:
half for G D = M, but more once G D < M / 2 (grouped keys). Scores and mixing cost H / G times M / D as much arithmetic
a query; a call with at most G D / H queries still does no more than building keys and values would, and so goes over
the hidden states. What changes keys after their projection (rotary positions, key norms) cannot be folded, so there are
no such slots.
"""

from typing import Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import refuse, tokens, whole
from regard.kernels import execute
from regard.kernels.check import check_mask
from regard.masks import Mask
from regard.pipeline.head_mixer import Projections
from regard.pipeline.kv_cache import KVCache
from regard.pipeline.layer import Attention
from regard.pipeline.streaming import check_streams
from regard.tracing import autocasts

CARD = Card(
    "el_attention",
    equation="""e_h = Wk_h^T (Wq_h x + bq_h)                 one query of width M for each head
a_h = softmax over s of e_h . x_s / sqrt(D)  (q_h . bk_h is the same for every s and drops out)
out = bo + sum_h Wo_h (Wv_h sum_s a_hs x_s + bv_h)""",
    papers=(
        Paper(
            "EL-Attention: Memory Efficient Lossless Attention for Generation",
            "Yan et al.",
            2021,
            "ICML 2021",
            "abstract; the authors' code",
        ),
    ),
    supports={"causal", "bidirectional", "cross", "padding", "packed", "mask", "gqa", "streaming", "compile"},
    traits=PLAIN,
    cost=Cost("2*B*H*T*S*D", "S*M"),
    claim="The same result as multi-head attention from a smaller state: half of the bytes of a key/value cache: "
    "tests/cache/test_el_attention.py::test_the_state_is_half_of_a_key_value_cache.",
    differs=(
        "Grouped keys, causal self-attention and several queries at a time are served too.",
        "Calls with many queries (a prompt, training) build keys and values, use them and let them go: cheaper, and "
        "the same numbers.",
    ),
    verified="third-party",
    example={"folded": 64},
    tries={"folded": ...},
    defaults={
        "folded": "ours, no more arithmetic than keys and values cost",
        "kernel": "ours",
        "bias": "ours, the authors' code has one",
        "context_dim": "ours, as wide as dim",
    },
)


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


@CARD.module
class ELAttention(Attention):
    """Multi-head attention whose streaming state is the hidden states that went in.

    Args:
        dim, num_heads, kernel, rest: as in `regard.Attention`.
        folded: calls with at most so many queries go over the hidden states, longer ones build keys and values;
            default G D / H, up to which that costs no more arithmetic.

    Shapes: x (B, T, M), context (B, S, context_dim) -> (B, T, M). All beams of a sentence can be its T queries.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        folded: int | None = None,
        kernel: str = "auto",
        **rest: Unpack[Projections],
    ) -> None:
        super().__init__(dim, num_heads, kernel=kernel, **rest)
        self.folded = self.num_kv_heads * self.head_dim // num_heads if folded is None else folded
        whole(self, 0, folded=self.folded)

    def init_state(  # type: ignore[override]
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

    def step(  # type: ignore[override]
        self,
        x: Float[Tensor, "B t M"],
        state: KVCache,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*b t"] | None = None,
    ) -> tuple[Float[Tensor, "B t M"], KVCache]:
        """The next t tokens: what `forward` would give at these positions, and the state with them in it.

        Args:
            mask, positions: as in `regard.Attention`; this layer has nothing that reads positions.
        """
        check_streams(self)
        tokens(self, "x", x, self.dim)
        if not isinstance(state, KVCache):
            given = type(state).__name__
            refuse(self, "state", "has the wrong type", given, "the KVCache of init_state", error=TypeError)
        if mask is not None and not isinstance(mask, Mask):
            refuse(self, "mask", "has the wrong type", type(mask).__name__, "a regard.masks.Mask", error=TypeError)
        check_mask(mask, x.shape[0], self.num_heads, x.shape[1], state.length + x.shape[1], x.device)
        kept = x.to(state.buffers["x"].dtype) if autocasts(x.device) and "x" in state.buffers else x
        held, state = state.append(x=kept)
        self._positions(positions, x.shape[0], x.shape[1], x.device)
        where = torch.arange(state.length, device=x.device)
        q, k, v, _, _ = self._project(x, held["x"], where, where, where)
        return self._finish(execute(self._problem(q, k, v, None, None, self._static(mask)), self.kernel), x), state

    def _project(
        self, x: Tensor, source: Tensor, where: Tensor, where_keys: Tensor, turn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries for the hidden states, and these as the one key and value of all heads."""
        if not self._folds(x):
            return super()._project(x, source, where, where_keys, turn)
        q = fold_keys(self._split(self.q_proj(x), self.num_heads), self._per_group(self.k_proj.weight))
        hidden = source[:, None].to(q.dtype)  # autocast projects to fewer bits than tokens have
        values = hidden if self.v_proj.bias is None else torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1)
        return q, hidden, values, x, source

    def _finish(self, out: Float[Tensor, "B H t V"], x: Tensor) -> Tensor:
        if self._folds(x):
            bias = None if self.v_proj.bias is None else self._per_group(self.v_proj.bias)
            out = unfold_values(out, self._per_group(self.v_proj.weight), bias)
        return super()._finish(out, x)

    def _folds(self, x: Tensor) -> bool:
        """Whether these tokens go over the hidden states; not where torch.export leaves open how many there are."""
        return not isinstance(x.shape[1], torch.SymInt) and x.shape[1] <= self.folded

    def _per_group(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (self.num_kv_heads, self.head_dim))
