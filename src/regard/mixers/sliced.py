"""Optimised and efficient attention: the tokens' own features are a head's values, and its keys.

With neither projected, keys and values are the same numbers, which a stream keeps once.
"""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, divides, refuse, tokens, whole
from regard.kernels import execute
from regard.kernels.check import check_mask
from regard.masks import Mask
from regard.pipeline.kv_cache import KVCache
from regard.pipeline.layer import Attention
from regard.pipeline.page_pool import PagePool
from regard.pipeline.paged_cache import State
from regard.pipeline.streaming import check_streams
from regard.stages import Position
from regard.tracing import autocasts

PAPER = Paper(
    "You Need to Pay Better Attention",
    "Hosseini, Hosseini",
    2024,
    "2403.01643",
    "abstracts of three versions; a third party's code, for which the authors answered questions; a reader's summary; "
    "the method's own text was not to be had",
)

CARD = Card(
    "sliced",
    equation="""x_h: features h D .. (h + 1) D of the tokens,   y = concat_h(softmax(q_h k_h^T / sqrt(D)) x_h) W_o
form = "efficient":   q_h = x W_q,h,   k_h = x_h                 2 M^2 parameters
form = "optimised":   q_h = x W_q,h,   k_h = x W_k,h             3 M^2""",
    papers=(PAPER,),
    supports={"causal", "bidirectional", "cross", "padding", "packed", "mask", "streaming", "dropout", "compile"},
    traits={"normalised", "nonnegative", "position_free", "shift_invariant"},
    cost=Cost("2*B*H*T*S*D", "S*H*D"),
    claim="Three quarters and half of the parameters, and what plain attention gives whose other projections are the "
    "identity: tests/mixers/test_sliced.py::test_is_attention_with_fewer_maps.",
    differs=(
        "Softmax runs over keys, as the formulas have it; the third party's code runs it over queries.",
        "A context is as wide as x, for its slices are keys and values.",
    ),
    verified="third-party",
    defaults={"form": "ours", "bias": "ours"},
)

Form = Literal["efficient", "optimised"]


def start(*projections: nn.Linear) -> None:
    """The third party's start: Glorot uniform weights, biases 0."""
    for proj in projections:
        nn.init.xavier_uniform_(proj.weight)
        if proj.bias is not None:
            nn.init.zeros_(proj.bias)


@CARD.module(closed=("position", "kernel"))
class SlicedAttention(Attention):
    """Attention without a projection of values, or of keys and values. Heads see their own features of the keys alone.

    Args:
        dim, num_heads, causal, dropout, position, kernel: as in `regard.Attention`.
        form: "efficient" projects queries alone, "optimised" keys, too.
        bias: whether the projections that are left have one.

    Shapes: x (B, T, M), context (B, S, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        form: Form = "efficient",
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
        position: Position | None = None,
        kernel: str = "auto",
    ) -> None:
        choice(self, get_args(Form), form=form)
        whole(self, dim=dim, num_heads=num_heads)
        divides(self, num_heads=num_heads, dim=dim)
        super().__init__(dim, num_heads, causal=causal, dropout=dropout, bias=bias, position=position, kernel=kernel)
        if position is not None and position.prepares():
            got = type(position).__name__
            refuse(
                self, "position", "asks for projections that this layer lacks", got, "one of tokens, keys and queries"
            )
        self.form = form
        del self.v_proj
        if form == "efficient":
            del self.k_proj
            start(self.q_proj)
        else:
            start(self.q_proj, self.k_proj)

    def init_state(  # type: ignore[override]
        self,
        batch_size: int,
        capacity: int,
        *,
        pool: PagePool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """As in `regard.Attention`; where keys are values, a cache that isn't paged holds the tokens, once, as `x`."""
        if self.form == "optimised" or self.position is not None or pool is not None:
            return super().init_state(batch_size, capacity, pool=pool, device=device, dtype=dtype)
        check_streams(self)
        whole("init_state", 0, batch_size=batch_size)
        whole("init_state", capacity=capacity)
        weight = self.q_proj.weight
        at: dict[str, Any] = {"device": device or weight.device, "dtype": dtype or weight.dtype}
        return KVCache({"x": torch.zeros(batch_size, capacity, self.dim, **at)})

    def step(  # type: ignore[override]
        self,
        x: Float[Tensor, "B t M"],
        state: State,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*b t"] | None = None,
    ) -> tuple[Float[Tensor, "B t M"], State]:
        """The next t tokens: what `forward` would give at these positions, and the state with them in it."""
        if not (isinstance(state, KVCache) and state.buffers.keys() == {"x"}):
            return super().step(x, state, mask=mask, positions=positions)
        check_streams(self)
        tokens(self, "x", x, self.dim)
        if mask is not None and not isinstance(mask, Mask):
            refuse(self, "mask", "has the wrong type", type(mask).__name__, "a regard.masks.Mask", error=TypeError)
        (B, t), length = x.shape[:2], state.length + x.shape[1]
        check_mask(mask, B, self.num_heads, t, length, x.device)
        self._positions(positions, B, t, x.device, state.length)
        q = self._split(self.q_proj(x), self.num_heads)
        new = x.to(state.buffers["x"].dtype) if autocasts(x.device) else x  # the state keeps the dtype it was made with
        held, state = state.append(x=new)
        k = self._split(held["x"].to(q.dtype), self.num_heads)
        out = execute(self._problem(q, k, k, None, None, self._static(mask), positions=positions), self.kernel)
        return self._finish(out, x), state

    def _project(
        self, x: Tensor, source: Tensor, where: Tensor, where_keys: Tensor, turn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if self.position is not None:
            alone = source is x
            x = self.position.embed(x, where)
            source = x if alone else self.position.embed(source, where_keys)
        q = self._split(self.q_proj(x), self.num_heads)
        v = k = self._split(source.to(q.dtype), self.num_heads)
        if self.form == "optimised":
            k = self._split(self.k_proj(source), self.num_heads)
        if self.position is not None:
            q, k = self.position.turn(q, k, turn, where_keys)
        return q, k, v, x, source
