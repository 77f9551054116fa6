"""Mamba-2 (SSD): a state space with one decay a head, in other words linear attention that decays."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, divides, flag, number, refuse, whole
from regard.kernels.linear_scan import CHUNK, Scan, linear_scan
from regard.linear._recurrence import Recurrence, conv_of_real, step_sizes, torch_taps
from regard.linear._shared import repeat_heads, widened
from regard.tracing import as_it_is
from regard.weights import Loaded, only, reshaped, same

CARD = Card(
    "mamba2",
    equation="""[z | X B C | dt] = x W_in,   X, B, C <- silu(conv(X B C) + b)  (4 taps),   dt <- softplus(dt + b_dt)
S_t = exp(dt_t A) S_{t-1} + dt_t B_t^T X_t,   o_t = C_t S_t + D X_t           (each head, A < 0; B and C of a group)
y_t = W_o (w * n(o_t * silu(z_t))),   n(u) = u / sqrt(mean(u^2) + eps) for the heads of each group together
so that o_i = sum_{j<=i} exp(A (dt_{j+1} + .. + dt_i)) (C_i . B_j) dt_j X_j + D X_i""",
    papers=(
        Paper(
            "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
            "Dao, Gu",
            2024,
            "2405.21060",
            "official code (mamba2_simple.py); the layer of transformers; not the paper's own text",
        ),
    ),
    supports={"causal", "padding", "packed", "streaming", "compile"},
    traits={"shift_invariant"},
    cost=Cost(
        "B*T*(M*(2*expand*M + 2*groups*state_dim + H) + 64*(expand*M + H*state_dim) + 2.5*expand*M*state_dim)",
        "expand*M*state_dim + (conv_size - 1)*(expand*M + 2*groups*state_dim)",
    ),
    claim="A token with a long step makes all later outputs independent of what came before it: "
    "tests/linear/test_mamba2.py::test_a_long_step_forgets.",
    differs=(
        "Heads are given by their number, num_heads, and are expand M / num_heads wide; the paper's are 64 wide.",
        "Hidden tokens leave no trace in the convolution, and the state does not decay over them; in the released code "
        "a bias of the first projection enters the convolution there, and the state decays.",
        "A starts at 1 .. H, as in transformers; the official code draws it from 1 to 16.",
        "Chunks of 64 tokens, which is fastest here, for the official 256: no output depends on it.",
        "Learned first states, an option of the official layer, are left out.",
    ),
    verified="third-party",
    example={"state_dim": 5, "groups": 2},
    tries={"chunk": ..., "dt_limits": (0.02, 0.03)},
    defaults={
        "expand": "code",
        "state_dim": "code",
        "groups": "code",
        "conv_size": "code",
        "conv_bias": "code",
        "bias": "code",
        "dt_limits": "code",
        "eps": "code",
        "chunk": "ours, the fastest here",
    },
)


@checked()
def state_space_dual(
    x: Float[Tensor, "B H T P"],
    dt: Float[Tensor, "B H T"],
    rate: Float[Tensor, " H"],
    b: Float[Tensor, "B G T N"],
    c: Float[Tensor, "B G T N"],
    *,
    state: Float[Tensor, "B H N P"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
    chunk: int = CHUNK,
) -> Scan:
    """o_t = c_t S_t with S_t = exp(-rate dt_t) S_{t-1} + dt_t b_t^T x_t, and the last S, in at least float32.

    Linear attention with queries c, keys b, values dt x and logarithms of decays -rate dt. Each group's b and c serve
    H / G heads that follow one another; a token with dt 0 passes the state on as it is.

    Args:
        dt, rate: >= 0.
        starts, chunk: those of `linear_scan`.

    Raises:
        ValueError: shapes that don't fit together.
    """
    H = x.shape[1]
    divides("state_space_dual", groups=b.shape[1], heads=H)
    x, dt, rate, b, c = widened(x, dt, rate, b, c)
    given = repeat_heads(c, H), repeat_heads(b, H), dt[..., None] * x
    return linear_scan(*given, -dt * rate[:, None], state=state, starts=starts, chunk=chunk)


class Mamba2State(NamedTuple):
    """All the past leaves behind, whatever its length."""

    s: Float[Tensor, "B H N P"]
    inputs: Float[Tensor, "B past C"]
    """The last inputs of the convolution: X, B and C."""


@CARD.module
class Mamba2(Recurrence):
    """The Mamba-2 token mixer.

    Args:
        dim, num_heads: M and H.
        expand: the heads together are expand M wide.
        state_dim: N, numbers that the state has for each channel.
        groups: how many B and C there are, and norms; they divide H.
        conv_size: taps of the convolution, the token itself included.
        conv_bias, bias: of the convolution, and of both projections.
        dt_limits: dt stays between these.
        eps: of the root mean square.
        chunk: tokens a chunk of the scan.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        expand: int = 2,
        state_dim: int = 128,
        groups: int = 1,
        conv_size: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        dt_limits: tuple[float, float] = (0.0, math.inf),
        eps: float = 1e-5,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "num_heads": num_heads, "expand": expand, "state_dim": state_dim, "groups": groups}
        whole(self, **sizes, conv_size=conv_size, chunk=chunk)
        flag(self, conv_bias=conv_bias, bias=bias)
        number(self, least=0, eps=eps)
        divides(self, num_heads=num_heads, inner=expand * dim)
        divides(self, groups=groups, num_heads=num_heads)
        if len(dt_limits) != 2 or not 0 <= dt_limits[0] <= dt_limits[1]:
            refuse(self, "dt_limits", "are out of order", dt_limits, "two numbers, 0 <= low <= high")
        self.dim, self.num_heads, self.state_dim, self.groups = dim, num_heads, state_dim, groups
        self.inner, self.dt_limits, self.eps, self.chunk = expand * dim, tuple(dt_limits), eps, chunk
        self.widths = (self.inner, self.inner + 2 * groups * state_dim, num_heads)
        self.in_proj = nn.Linear(dim, sum(self.widths), bias=bias)
        self.taps = nn.Parameter(torch.empty(self.widths[1], conv_size))
        self.taps_bias = nn.Parameter(torch.empty(self.widths[1])) if conv_bias else None
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.log_rate = nn.Parameter(torch.empty(num_heads))
        self.skip = nn.Parameter(torch.empty(num_heads))
        self.norm_weight = nn.Parameter(torch.empty(self.inner))
        self.o_proj = nn.Linear(self.inner, dim, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Rates 1 .. H, steps between 0.001 and 0.1, all else 1 or as torch has it; projections reset themselves."""
        torch_taps(self.taps, self.taps_bias)
        step_sizes(self.dt_bias)
        self.log_rate.copy_(torch.arange(1.0, self.num_heads + 1, device=self.log_rate.device).log())
        for p in (self.skip, self.norm_weight):
            nn.init.ones_(p)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, state_dim={self.state_dim}, groups={self.groups}"

    def run(
        self, x: Tensor, state: Mamba2State | None, keep: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, Mamba2State]:
        projected = self.in_proj(x)
        with as_it_is(x.device):
            (wide,) = widened(projected)
            z, mixed, dt = wide.split(self.widths, -1)
            s, inputs = (None, None) if state is None else state
            mixed, inputs = conv_of_real(mixed, self.taps, self.taps_bias, state=inputs, keep=keep, starts=starts)
            mixed = F.silu(mixed)
            dt = F.softplus(dt + self.dt_bias).clamp(*self.dt_limits).mT
            if keep is not None:
                dt = dt.masked_fill(~keep[:, None], 0)
            each = (self.inner, self.groups * self.state_dim, self.groups * self.state_dim)
            heads = (self.num_heads, self.groups, self.groups)
            v, b, c = (u.unflatten(-1, (n, -1)).transpose(1, 2) for u, n in zip(mixed.split(each, -1), heads))
            out, s = state_space_dual(
                v, dt, self.log_rate.to(v.dtype).exp(), b, c, state=s, starts=starts, chunk=self.chunk
            )
            out = (out + self.skip[:, None, None] * v).transpose(1, 2).flatten(2) * F.silu(z)
            grouped = out.unflatten(-1, (self.groups, -1))
            normed = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
            out = (normed.flatten(2) * self.norm_weight).to(projected.dtype)
        return self.o_proj(out), Mamba2State(s, inputs)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Mamba2State:
        s = (batch_size, self.num_heads, self.state_dim, self.inner // self.num_heads)
        inputs = (batch_size, self.taps.shape[1] - 1, self.widths[1])
        return Mamba2State(*(torch.zeros(shape, device=device, dtype=dtype) for shape in (s, inputs)))


@CARD.loads("transformers", "Mamba2Mixer")
def _mamba2(theirs: Any) -> Loaded:
    only(theirs, {"activation": "silu"})
    options = {
        "expand": theirs.intermediate_size // theirs.hidden_size,
        "state_dim": theirs.ssm_state_size,
        "groups": theirs.n_groups,
        "conv_size": theirs.conv_kernel_size,
        "conv_bias": theirs.use_conv_bias,
        "bias": theirs.use_bias,
        "dt_limits": tuple(theirs.time_step_limit),
        "eps": theirs.layer_norm_epsilon,
    }
    names = {"in_proj": "in_proj", "taps_bias": "conv1d.bias", "dt_bias": "dt_bias", "log_rate": "A_log"}
    names |= {"skip": "D", "norm_weight": "norm.weight", "o_proj": "out_proj"}
    taps = reshaped("taps", "conv1d.weight", lambda w: w[:, 0], lambda w: w[:, None])
    return Loaded(lambda: Mamba2(theirs.hidden_size, theirs.num_heads, **options), [*same(theirs, names), taps])
