"""Mamba: a state space whose steps, inputs and outputs are chosen by each token (selective scan)."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard.cards import Card, Cost, Paper
from regard.checks import checked, flag, whole
from regard.kernels.channel_scan import channel_scan
from regard.linear._recurrence import Recurrence, conv_of_real, step_sizes, torch_taps
from regard.linear._shared import widened
from regard.tracing import active, as_it_is, exporting
from regard.weights import Loaded, only, reshaped, same

CHUNK = 256
"""Tokens whose states are in memory at once."""

CARD = Card(
    "mamba",
    equation="""[u | z] = x W_in,   u <- silu(conv(u) + b)  (4 taps),   [d | B | C] = u W_x
dt = softplus(d W_dt + b_dt),   S_t[c, n] = exp(dt_tc A_cn) S_{t-1}[c, n] + dt_tc B_tn u_tc,   A < 0
o_tc = sum_n C_tn S_t[c, n] + D_c u_tc,   y_t = W_o (o_t * silu(z_t))""",
    papers=(
        Paper(
            "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
            "Gu, Dao",
            2023,
            "2312.00752",
            "the layer of transformers; not the paper's own text",
        ),
    ),
    supports={"causal", "padding", "packed", "streaming", "compile"},
    traits={"shift_invariant"},
    cost=Cost(
        "B*T*expand*M*(2*M + 2*dt_rank + 3*state_dim)",
        "expand*M*(state_dim + conv_size - 1)",
    ),
    claim="One token decides whether those before it are still seen, by the length of its step: "
    "tests/linear/test_mamba.py::test_a_long_step_forgets_and_a_short_one_skips.",
    differs=(
        "Hidden tokens leave no trace in the convolution, and the state does not decay over them; in the released code "
        "a bias of the first projection enters the convolution there, and the state decays.",
        "States of `chunk` tokens are in memory at once, and are computed again for gradients; torch.compile and "
        "torch.func see those of all tokens.",
    ),
    verified="third-party",
    example={"state_dim": 3, "dt_rank": 2},
    tries={"chunk": ...},
    defaults={
        "expand": "code",
        "state_dim": "code",
        "dt_rank": "code, M / 16 rounded up",
        "conv_size": "code",
        "conv_bias": "code",
        "bias": "code",
        "chunk": "ours",
    },
)


class Selected(NamedTuple):
    """What came out, and what the past leaves behind."""

    out: Float[Tensor, "B T I"]
    state: Float[Tensor, "B I N"]


@checked()
def selective_scan(
    u: Float[Tensor, "B T I"],
    dt: Float[Tensor, "B T I"],
    a: Float[Tensor, "I N"],
    b: Float[Tensor, "B T N"],
    c: Float[Tensor, "B T N"],
    skip: Float[Tensor, " I"] | None = None,
    *,
    state: Float[Tensor, "B I N"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
    chunk: int = CHUNK,
) -> Selected:
    """o_t = S_t c_t + skip u_t with S_t = exp(dt_t a) S_{t-1} + (dt_t u_t) b_t^T, and the last S, in at least float32.

    A token with dt 0 passes the state on as it is. Chunk by chunk, so that the (T, I, N) states are never there at
    once, in training neither: they are computed again for the gradients.

    Args:
        dt: >= 0, how long a step each channel takes.
        a: <= 0, rates of decay of each channel's N numbers.
        starts: True at the first token of each packed document, as in `linear_scan`.
        chunk: tokens a chunk.

    Raises:
        ValueError: shapes that don't fit together.
    """
    whole("selective_scan", chunk=chunk)
    u, dt, a, b, c = widened(u, dt, a, b, c)
    T, whole_at_once = u.shape[1], torch.compiler.is_compiling() or exporting() or active()
    state = u.new_zeros(u.shape[0], *a.shape) if state is None else state
    if whole_at_once or chunk >= T:
        out, state = _chunk(u, dt, a, b, c, state, starts)
    else:
        outs = []
        begin = None if starts is None else starts.expand(len(u), -1)
        again = torch.is_grad_enabled() and any(z.requires_grad for z in (u, dt, a, b, c, state))
        for t in range(0, T, chunk):
            given = [z[:, t : t + chunk] for z in (u, dt, b, c)]
            begins = None if begin is None else begin[:, t : t + chunk]
            part: tuple[Any, ...] = (*given[:2], a, *given[2:], state, begins)
            out, state = checkpoint(_chunk, *part, use_reentrant=False) if again else _chunk(*part)
            outs.append(out)
        out = torch.cat(outs, 1)
    return Selected(out if skip is None else out + skip * u, state)


def _chunk(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Each channel's N numbers are so many channels of one scan."""
    added = (dt * u)[..., None] * b[:, :, None]
    states, last = channel_scan(added.flatten(2), (dt[..., None] * a).flatten(2), state=state.flatten(1), starts=starts)
    return (states.unflatten(2, a.shape) @ c[..., None]).squeeze(-1), last.unflatten(1, a.shape)


class MambaState(NamedTuple):
    """All the past leaves behind, whatever its length."""

    s: Float[Tensor, "B I N"]
    inputs: Float[Tensor, "B past I"]
    """The last inputs of the convolution."""


class Selective(nn.Module):
    """What each direction of a scan has for itself: convolution, choices, rates and skip. `hold` makes the parameters.

    Shapes: u (B, T, I) -> (B, T, I).
    """

    def hold(self, inner: int, state_dim: int, dt_rank: int, conv_size: int, conv_bias: bool, chunk: int) -> None:
        self.inner, self.state_dim, self.dt_rank, self.chunk = inner, state_dim, dt_rank, chunk
        self.taps = nn.Parameter(torch.empty(inner, conv_size))
        self.taps_bias = nn.Parameter(torch.empty(inner)) if conv_bias else None
        self.select_weight = nn.Parameter(torch.empty(dt_rank + 2 * state_dim, inner))
        self.dt_weight = nn.Parameter(torch.empty(inner, dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.log_rate = nn.Parameter(torch.empty(inner, state_dim))
        self.skip = nn.Parameter(torch.empty(inner))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Rates 1 .. N, steps between 0.001 and 0.1, all else 1 or as torch has it; projections reset themselves."""
        torch_taps(self.taps, self.taps_bias)
        nn.init.uniform_(self.select_weight, -(self.inner**-0.5), self.inner**-0.5)
        nn.init.uniform_(self.dt_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        step_sizes(self.dt_bias)
        self.log_rate.copy_(torch.arange(1.0, self.state_dim + 1, device=self.log_rate.device).log())
        nn.init.ones_(self.skip)

    def selected(
        self, u: Tensor, state: MambaState | None, keep: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, MambaState]:
        """o of what is projected, and the state after it."""
        s, past = (None, None) if state is None else state
        u, inputs = conv_of_real(u, self.taps, self.taps_bias, state=past, keep=keep, starts=starts)
        u = F.silu(u)
        each = (self.dt_rank, self.state_dim, self.state_dim)
        d, b, c = F.linear(u, self.select_weight.to(u.dtype)).split(each, -1)
        dt = F.softplus(F.linear(d, self.dt_weight.to(u.dtype), self.dt_bias.to(u.dtype)))
        if keep is not None:
            dt = dt.masked_fill(~keep[..., None], 0)
        a = -self.log_rate.to(u.dtype).exp()
        out, s = selective_scan(u, dt, a, b, c, self.skip.to(u.dtype), state=s, starts=starts, chunk=self.chunk)
        return out, MambaState(s, inputs)


def rank(who: object, dim: int, expand: int, state_dim: int, dt_rank: int | None, conv_size: int, chunk: int) -> int:
    """R, M / 16 rounded up where it isn't told; refuses sizes that are none."""
    whole(who, dim=dim, expand=expand, state_dim=state_dim, conv_size=conv_size, chunk=chunk)
    dt_rank = -(-dim // 16) if dt_rank is None else dt_rank
    whole(who, dt_rank=dt_rank)
    return dt_rank


@CARD.module
class Mamba(Recurrence, Selective):
    """The Mamba token mixer.

    Args:
        dim: M.
        expand: I = expand M channels.
        state_dim: N, numbers that the state has for each channel.
        dt_rank: R, through which steps are projected; default M / 16, rounded up.
        conv_size: taps of the convolution, the token itself included.
        conv_bias, bias: of the convolution, and of the first and last projection.
        chunk: tokens whose states are in memory at once.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 2,
        state_dim: int = 16,
        dt_rank: int | None = None,
        conv_size: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__()
        dt_rank = rank(self, dim, expand, state_dim, dt_rank, conv_size, chunk)
        flag(self, conv_bias=conv_bias, bias=bias)
        self.dim = dim
        self.in_proj = nn.Linear(dim, 2 * expand * dim, bias=bias)
        self.hold(expand * dim, state_dim, dt_rank, conv_size, conv_bias, chunk)
        self.o_proj = nn.Linear(expand * dim, dim, bias=bias)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.dim}, inner={self.inner}, state_dim={self.state_dim}, dt_rank={self.dt_rank}"

    def run(
        self, x: Tensor, state: MambaState | None, keep: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, MambaState]:
        projected = self.in_proj(x)
        with as_it_is(x.device):
            u, z = widened(projected)[0].chunk(2, -1)
            out, state = self.selected(u, state, keep, starts)
            out = (out * F.silu(z)).to(projected.dtype)
        return self.o_proj(out), state

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> MambaState:
        s, inputs = (batch_size, self.inner, self.state_dim), (batch_size, self.taps.shape[1] - 1, self.inner)
        return MambaState(*(torch.zeros(shape, device=device, dtype=dtype) for shape in (s, inputs)))


@CARD.loads("transformers", "MambaMixer")
def _mamba(theirs: Any) -> Loaded:
    only(theirs, {"activation": "silu"})
    options = {
        "expand": theirs.intermediate_size // theirs.hidden_size,
        "state_dim": theirs.ssm_state_size,
        "dt_rank": theirs.time_step_rank,
        "conv_size": theirs.conv_kernel_size,
        "conv_bias": theirs.use_conv_bias,
        "bias": theirs.use_bias,
    }
    names = {"in_proj": "in_proj", "taps_bias": "conv1d.bias", "select_weight": "x_proj.weight", "log_rate": "A_log"}
    names |= {"dt_weight": "dt_proj.weight", "dt_bias": "dt_proj.bias", "skip": "D", "o_proj": "out_proj"}
    taps = reshaped("taps", "conv1d.weight", lambda w: w[:, 0], lambda w: w[:, None])
    return Loaded(lambda: Mamba(theirs.hidden_size, **options), [*same(theirs, names), taps])
