"""Exponential smoothing attention: a token is weighted by how long ago it was, and by nothing else.

    out_t = a out_{t-1} + (1 - a) v_t = a^(t+1) v_0 + sum_{j <= t} (1 - a) a^(t-j) v_j,   0 < a < 1 for each head
    growth:  u = W_in z,   d_t = u_t - u_{t-1},   g = W_out [v_0, smoothed d]     (u_{-1} and v_0 are learned)
    level:   e_t = (1 - a) (x_t - season_t) + a (e_{t-1} + growth_t)
    damped:  forecast_h = growth_T (gamma + gamma^2 + ... + gamma^h)

Woo et al. 2022, https://arxiv.org/abs/2202.01381: abstract read; equations as the authors' released code has them.
Differs from the code: the level follows the recursion of exponential smoothing, where theirs adds a^(T - t) growth_t
for its sum over time. Differs from the paper: alpha = 1 - a is its smoothing factor; sums are taken in blocks, in
linear time, not by FFT.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard._former import Card, Cost, Paper, register
from regard.checks import tokens as check_tokens
from regard.masks import Mask, causal
from regard.mixers.exponential import exponential_sum, lags, work_dtype
from regard.pipeline.tokens import quarantine, spoil
from regard.positions._shared import check_int
from regard.shapes import HeadShape, head_counts


def exponential_smoothing(
    v: Float[Tensor, "B T H D"], a: Float[Tensor, "H"], before: Float[Tensor, "*b H D"]
) -> Float[Tensor, "B T H D"]:
    """out_t = a out_{t-1} + (1 - a) v_t; `before` is out_{-1}, for each batch row or for all."""
    if v.dim() != 4 or a.shape != v.shape[2:3] or before.shape[-2:] != v.shape[2:]:
        raise ValueError(
            f"exponential_smoothing: got v {tuple(v.shape)}, a {tuple(a.shape)} and before {tuple(before.shape)}; "
            "expected (batch, tokens, heads, width), (heads,) and (heads, width)"
        )
    return _smoothed((1 - a[:, None]) * v, a, before)


def smoothed_level(
    x: Float[Tensor, "B T C"],
    season: Float[Tensor, "B T C"],
    growth: Float[Tensor, "B T C"],
    a: Float[Tensor, "C"],
    before: Float[Tensor, "*b C"],
) -> Float[Tensor, "B T C"]:
    """e_t = (1 - a) (x_t - season_t) + a (e_{t-1} + growth_t); growth_t is the growth known one step earlier."""
    steps = (1 - a) * (x - season) + a * growth
    return _smoothed(steps[..., None], a, before[..., None])[..., 0]


def damped_growth(
    growth: Float[Tensor, "B H D"], gamma: Float[Tensor, "H"], horizon: int
) -> Float[Tensor, "B {horizon} H D"]:
    """What the last growth adds to each of the next `horizon` steps."""
    ages = torch.arange(1, horizon + 1, device=gamma.device)
    return growth[:, None] * (gamma ** ages[:, None]).cumsum(0)[None, :, :, None]


def _smoothed(steps: Float[Tensor, "B T H D"], a: Float[Tensor, "H"], before: Tensor) -> Float[Tensor, "B T H D"]:
    """out_t = a out_{t-1} + steps_t."""
    B, _, H, D = steps.shape
    rows = steps.permute(0, 3, 1, 2).flatten(0, 1)  # a head's channels share its decay: they are rows of one batch
    work = work_dtype(steps)
    state = before.to(work).expand(B, H, D).transpose(1, 2).flatten(0, 1)[..., None]
    powers = a.to(work)[:, None, None] ** lags(rows)
    out, _ = exponential_sum(rows, powers, torch.ones_like(powers[..., 0]), state)
    return out.unflatten(0, (B, D)).permute(0, 2, 3, 1)


class SmoothingState(NamedTuple):
    """What the past leaves behind."""

    last: Float[Tensor, "B H D"]
    """u of the last token."""
    smoothed: Float[Tensor, "B H D"]


class ExponentialSmoothingAttention(nn.Module):
    """The growth of each feature: its changes from token to token, smoothed, H heads with a decay each.

    Args:
        dim, num_heads: M and H.
        head_dim: D; default dim / num_heads.
    """

    supports: frozenset[str] = frozenset({"causal", "streaming", "compile"})
    causal = True
    name = "exponential_smoothing"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        _, D = head_counts(dim, num_heads, None, head_dim)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, D
        self.v_proj = nn.Linear(dim, num_heads * D)
        self.o_proj = nn.Linear(num_heads * D, dim)
        self.theta = nn.Parameter(torch.empty(num_heads))
        self.last = nn.Parameter(torch.empty(num_heads, D))
        self.smoothed = nn.Parameter(torch.empty(num_heads, D))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for p in (self.theta, self.last, self.smoothed):
            nn.init.normal_(p)

    def receptive_field(self) -> Mask:
        """Every earlier token."""
        return causal()

    def forward(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        """The growth that is known at each token."""
        check_tokens(self.name, "x", x, self.dim)
        x, bad = quarantine(x)
        return spoil(self._run(x, self._start(x.shape[0]))[0], bad, bad, causal())

    def growth(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T1 M"]:
        """T + 1 of them: the one known before the first token comes first."""
        before = self.o_proj(self.smoothed.flatten()).expand(x.shape[0], 1, -1)
        return torch.cat([before, self(x)], 1)

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SmoothingState:
        """Nothing seen yet. The state has one size for every length, so `capacity` limits nothing."""
        check_int("init_state", "batch_size", batch_size, least=0)
        check_int("init_state", "capacity", capacity)
        last, smoothed = self._start(batch_size)
        return SmoothingState(last.to(device=device, dtype=dtype), smoothed.to(device=device))

    def step(self, x: Float[Tensor, "B t M"], state: SmoothingState) -> tuple[Float[Tensor, "B t M"], SmoothingState]:
        """The next t tokens."""
        check_tokens(self.name, "x", x, self.dim)
        if not isinstance(state, SmoothingState):
            raise TypeError(f"step: state must be the SmoothingState of init_state, got {type(state).__name__}")
        if x.shape[0] != state.last.shape[0]:
            raise ValueError(f"step: x has batch {x.shape[0]} and the state {state.last.shape[0]}; they must match")
        return self._run(x, state)

    def _start(self, batch: int) -> SmoothingState:
        """The learned past of every sequence."""
        last, smoothed = (p.expand(batch, -1, -1) for p in (self.last, self.smoothed))
        return SmoothingState(last, smoothed.to(work_dtype(smoothed)))

    def _run(self, x: Tensor, state: SmoothingState) -> tuple[Tensor, SmoothingState]:
        u = self.v_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        known = torch.cat([state.last[:, None].to(u.dtype), u], 1)
        work = work_dtype(u)
        changes = (known[:, 1:] - known[:, :-1]).to(work)
        smooth = exponential_smoothing(changes, self.theta.to(work).sigmoid(), state.smoothed)
        held = torch.cat([state.smoothed[:, None].to(work), smooth], 1)[:, -1]
        return self.o_proj(smooth.to(u.dtype).flatten(2)), SmoothingState(known[:, -1], held)


def _build(
    shape: HeadShape,
    *,
    causal: bool,
) -> ExponentialSmoothingAttention:
    if not causal:
        raise ValueError("exponential_smoothing: only looks back (got causal=False); expected causal=True")
    return ExponentialSmoothingAttention(shape.dim, shape.num_heads, head_dim=shape.head_dim)


PAPER = Paper(
    "ETSformer: Exponential Smoothing Transformers for Time-series Forecasting",
    "Woo et al.",
    2022,
    "2202.01381",
    "abstract; official code",
)

CARD = register(
    Card(
        name="exponential_smoothing",
        family="timeseries",
        gist="Weights that fade with age, one rate a head: a smoothed growth of every feature.",
        equation="out_t = a out_{t-1} + (1 - a) (u_t - u_{t-1})",
        paper=PAPER,
        build=_build,
        supports=ExponentialSmoothingAttention.supports,
        cost=Cost("B*T*H*D*68", "2*H*D"),
        claim="The same as the T x T matrix of weights, in less than quadratic time: "
        "tests/timeseries/test_exponential_smoothing.py.",
        differs=("The sum over the past is taken in blocks (`regard.mixers.exponential`), not by one FFT.",),
        verified="third-party",
    )
)
