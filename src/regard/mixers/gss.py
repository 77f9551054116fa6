"""Gated state space: a diagonal state space on a narrow branch, multiplied into a wide gated one.

Its kernel K_l = Re( C ((exp(lambda) - 1) / lambda) exp(lambda l) ) is a formula in l, so a layer runs on any length.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.cards import Card, Cost, Paper
from regard.checks import checked, refuse, whole
from regard.masks import Mask, causal, padding
from regard.mixers.exponential import exponential_sum, lags, work_dtype
from regard.pipeline.tokens import apart, key_mask, quarantine, shown, spoil

CARD = Card(
    "gss",
    equation="""z = LN(x_t),   u = gelu(W_u z)  (width F),   w = LN(gelu(W_v z))  (width E)
h_t = exp(lambda) h_{t-1} + w_t,   y_t = Re( C ((exp(lambda) - 1) / lambda) h_t ) + d w_t   (N complex states)
out = W_o (u * W_g y_t) + b_o + x_t,       lambda_n = -exp(a_n) + i exp(b_n), the same for every channel""",
    papers=(
        Paper(
            "Long Range Language Modeling via Gated State Spaces",
            "Mehta et al.",
            2022,
            "2206.13947",
            "abstract; public implementation of the pseudocode in section 3.2",
        ),
    ),
    supports={"causal", "padding", "packed", "streaming", "compile"},
    traits={"shift_invariant"},
    cost=Cost("B*T*(state_dim*(64 + 4*num_states + hidden_dim) + M*hidden_dim)", "2*state_dim*num_states"),
    claim="Runs on inputs longer than it was trained on, in a state that does not grow: "
    "tests/mixers/test_gss.py::test_a_layer_runs_on_any_length_in_one_state.",
    differs=(
        "The sum over the past is taken in blocks (`regard.mixers.exponential`), not by one FFT.",
        "The hybrid with local attention in every few layers is left to the model that stacks the layers.",
    ),
    verified="third-party",
    example={"hidden_dim": 20, "state_dim": 7, "num_states": 5},
    defaults={
        "hidden_dim": "code, lucidrains",
        "state_dim": "ours, lucidrains' 256 where M = 1024",
        "num_states": "ours, lucidrains' 512 where M = 1024",
        "positive_turns": "code, lucidrains",
    },
)


def diagonal_state_space(
    w: Float[Tensor, "B T E"],
    log_decay: Float[Tensor, " N"],
    turn: Float[Tensor, " N"],
    c: Float[Tensor, "E N 2"],
    state: Complex[Tensor, "B E N"] | None = None,
) -> tuple[Float[Tensor, "B T E"], Complex[Tensor, "B E N"]]:
    """y without the skip, and the last h. lambda = log_decay + i turn, log_decay < 0; c: real and imaginary parts."""
    work = work_dtype(w)
    log_decay, turn, c = log_decay.to(work), turn.to(work), torch.view_as_complex(c.to(work).contiguous())
    rate = torch.complex(log_decay, turn)
    # exp(lambda) - 1 without the loss of digits near lambda = 0
    less_one = torch.complex(
        torch.expm1(log_decay) * turn.cos() - 2 * (turn / 2).sin().square(), log_decay.exp() * turn.sin()
    )
    powers = torch.exp(rate[:, None] * lags(w))[None]
    return exponential_sum(w, powers, c * (less_one / rate), state)


class GSSState(NamedTuple):
    """What the past leaves behind, whatever its length."""

    h: Complex[Tensor, "B E N"]


@CARD.module
class GatedStateSpace(nn.Module):
    """One causal GSS layer, normalisation and residual included.

    Args:
        dim: M.
        hidden_dim: F, the width of the gate; default 4 M.
        state_dim: E, the width of the state space's input and output; default M / 4.
        num_states: N, complex states that each of those channels has; default M / 2. All three are in the proportions
            of the paper's layers (4096, 256 and 512 for M = 1024), as far as the implementation tells.
        positive_turns: the frequencies are exp(b), as in the paper, or b itself.
    """

    causal = True

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: int | None = None,
        state_dim: int | None = None,
        num_states: int | None = None,
        positive_turns: bool = True,
    ) -> None:
        super().__init__()
        whole(self, dim=dim)
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        state_dim = max(1, dim // 4) if state_dim is None else state_dim
        num_states = max(1, dim // 2) if num_states is None else num_states
        whole(self, hidden_dim=hidden_dim, state_dim=state_dim, num_states=num_states)
        self.hidden_dim = hidden_dim
        self.dim, self.state_dim, self.num_states, self.positive_turns = dim, state_dim, num_states, positive_turns
        self.norm = nn.LayerNorm(dim)
        self.u_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.v_proj = nn.Linear(dim, state_dim, bias=False)
        self.state_norm = nn.LayerNorm(state_dim)
        self.a = nn.Parameter(torch.empty(num_states))
        self.b = nn.Parameter(torch.empty(num_states))
        self.c = nn.Parameter(torch.empty(state_dim, num_states, 2))
        self.skip = nn.Parameter(torch.empty(state_dim))
        self.gate_proj = nn.Linear(state_dim, hidden_dim, bias=False)
        self.o_proj = nn.Linear(hidden_dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random, with no special matrix: the paper finds that to be enough."""
        for p in (self.a, self.b, self.c, self.skip):
            nn.init.normal_(p)

    def receptive_field(self) -> Mask:
        """Every earlier token."""
        return causal()

    @checked(M="dim")
    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """`mask` hides tokens from all states: `regard.masks.padding`, or True = a real token."""
        keep, packed = key_mask(self, mask, x)
        if packed is not None:
            return apart(self, x, packed, keep)
        x, bad = quarantine(x)
        return spoil(self._run(x, None, keep)[0], bad, bad, causal() if keep is None else causal() & padding(keep))

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GSSState:
        """Nothing seen yet. The state has one size for every length, so `capacity` limits nothing."""
        whole(self, 0, batch_size=batch_size)
        whole(self, capacity=capacity)
        work = work_dtype(self.skip.new_empty(0, dtype=dtype))
        kind = torch.complex128 if work == torch.float64 else torch.complex64
        shape = (batch_size, self.state_dim, self.num_states)
        return GSSState(torch.zeros(shape, device=device or self.skip.device, dtype=kind))

    @checked(M="dim")
    def step(
        self, x: Float[Tensor, "B t M"], state: GSSState, *, mask: Bool[Tensor, "B t"] | None = None
    ) -> tuple[Float[Tensor, "B t M"], GSSState]:
        """The next t tokens. `mask`: True = a real one, of these t; hidden ones leave nothing behind."""
        if not isinstance(state, GSSState):
            wanted = "the GSSState of init_state"
            refuse(self, "state", "has the wrong type", type(state).__name__, wanted, error=TypeError)
        if x.shape[0] != len(state.h):
            refuse(self, "x", "has another batch than the state", x.shape[0], f"{len(state.h)} sequences")
        y, h = self._run(shown(self, x, mask), state.h, mask)
        return y, GSSState(h)

    def _run(self, x: Tensor, state: Tensor | None, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = self.norm(x)
        w = self.state_norm(F.gelu(self.v_proj(z)))
        if keep is not None:
            w = w.masked_fill(~keep[..., None], 0)
        work = work_dtype(w)
        turn = self.b.to(work).exp() if self.positive_turns else self.b
        y, state = diagonal_state_space(w, -self.a.to(work).exp(), turn, self.c, state)
        out = self.o_proj(F.gelu(self.u_proj(z)) * self.gate_proj(y + self.skip * w))
        return out + x.to(out.dtype), state
