"""Exponential smoothing attention: tokens are weighted by how long ago they were, and by nothing else."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, refuse, whole
from regard.masks import Mask, causal
from regard.mixers.exponential import exponential_sum, lags, work_dtype
from regard.pipeline.tokens import quarantine, spoil
from regard.shapes import head_shape

PAPERS = (
    Paper(
        "ETSformer: Exponential Smoothing Transformers for Time-series Forecasting",
        "Woo et al.",
        2022,
        "2202.01381",
        "abstract; official code",
    ),
)

CARD = Card(
    "exponential_smoothing",
    equation="""out_t = a out_{t-1} + (1 - a) v_t = a^(t+1) v_0 + sum_{j <= t} (1 - a) a^(t-j) v_j,   0 < a < 1 a head
growth:  u = W_in z,   d_t = u_t - u_{t-1},   g = W_out [v_0, smoothed d]     (u_{-1} and v_0 are learned)
level:   e_t = (1 - a) (x_t - season_t) + a (e_{t-1} + growth_t)
damped:  forecast_h = growth_T (gamma + gamma^2 + ... + gamma^h)""",
    papers=PAPERS,
    supports={"causal", "streaming", "compile"},
    cost=Cost("B*T*H*D*68", "2*H*D"),
    claim="The same as the T x T matrix of weights, without forming it: "
    "tests/timeseries/test_exponential_smoothing.py::test_smoothing_equals_its_matrix, "
    "tests/timeseries/test_exponential_smoothing.py::test_no_square_matrix.",
    differs=(
        "The paper's smoothing factor is alpha = 1 - a.",
        "The level follows the recursion of exponential smoothing, where the authors' code adds a^(T - t) growth_t for "
        "its sum over time.",
        "Sums over the past are taken in blocks, in linear time (`regard.mixers.exponential`), not by one FFT.",
    ),
    verified="third-party",
)


@checked()
def exponential_smoothing(
    v: Float[Tensor, "B T H D"], a: Float[Tensor, " H"], before: Float[Tensor, "*b H D"]
) -> Float[Tensor, "B T H D"]:
    """out_t = a out_{t-1} + (1 - a) v_t; `before` is out_{-1}, for each batch row or for all."""
    return _smoothed((1 - a[:, None]) * v, a, before)


def smoothed_level(
    x: Float[Tensor, "B T C"],
    season: Float[Tensor, "B T C"],
    growth: Float[Tensor, "B T C"],
    a: Float[Tensor, " C"],
    before: Float[Tensor, "*b C"],
) -> Float[Tensor, "B T C"]:
    """e_t = (1 - a) (x_t - season_t) + a (e_{t-1} + growth_t); growth_t is the growth known one step earlier."""
    steps = (1 - a) * (x - season) + a * growth
    return _smoothed(steps[..., None], a, before[..., None])[..., 0]


def damped_growth(
    growth: Float[Tensor, "B H D"], gamma: Float[Tensor, " H"], horizon: int
) -> Float[Tensor, "B {horizon} H D"]:
    """What the last growth adds to each of the next `horizon` steps."""
    ages = torch.arange(1, horizon + 1, device=gamma.device)
    return growth[:, None] * (gamma ** ages[:, None]).cumsum(0)[None, :, :, None]


def _smoothed(steps: Float[Tensor, "B T H D"], a: Float[Tensor, " H"], before: Tensor) -> Float[Tensor, "B T H D"]:
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


@CARD.module
class ExponentialSmoothingAttention(nn.Module):
    """The growth of each feature: its changes from token to token, smoothed, H heads with a decay each.

    Args:
        dim, num_heads: M and H.
        head_dim: D; default dim / num_heads.
    """

    causal = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        D = head_shape(dim, num_heads, None, head_dim, who=type(self).__name__).head_dim
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

    @checked(M="dim")
    def forward(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        """The growth that is known at each token."""
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
        whole(self, 0, batch_size=batch_size)
        whole(self, capacity=capacity)
        last, smoothed = self._start(batch_size)
        return SmoothingState(last.to(device=device, dtype=dtype), smoothed.to(device=device))

    @checked(M="dim")
    def step(self, x: Float[Tensor, "B t M"], state: SmoothingState) -> tuple[Float[Tensor, "B t M"], SmoothingState]:
        """The next t tokens."""
        if not isinstance(state, SmoothingState):
            wanted = "the SmoothingState of init_state"
            refuse(self, "state", "has the wrong type", type(state).__name__, wanted, error=TypeError)
        if x.shape[0] != len(state.last):
            refuse(self, "x", "has another batch than the state", x.shape[0], f"{len(state.last)} sequences")
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
