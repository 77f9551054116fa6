"""Lightning attention (TransNormerLLM): linear attention that decays, with a norm and a gate.

There is neither a softmax, nor a denominator, nor 1 / sqrt(D).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, number
from regard.kernels.check import check_inputs
from regard.kernels.linear_scan import Scan, linear_scan
from regard.linear._shared import RecurrentMixer, hide, repeat_heads, widened
from regard.positions.alibi import alibi_slopes

CARD = Card(
    "lightning",
    equation="""q, k <- silu(q), silu(k);   q_t <- [q_t cos(t theta), q_t sin(t theta)], k likewise              (LRPE)
o_t = sum_{u<=t} exp(-s_h (t - u)) (q_t . k_u) v_u
y_t = W_o (u_t * o_t / sqrt(mean(o_t^2) + eps)),   o_t all heads side by side,   u = x W_u
s_h = 2^(-8h/H) (1 - depth + 1e-5) for head h = 1 .. H where H is a power of two, as ALiBi's slopes otherwise
streaming:  S <- exp(-s_h) S + k^T v,   o = q S""",
    papers=(
        Paper(
            "Scaling TransNormer to 175 Billion Parameters",
            "Qin et al.",
            2023,
            "2307.14995",
            "abstract; official code (layer and kernel)",
        ),
    ),
    supports={"causal", "padding", "packed", "gqa", "streaming", "compile"},
    traits={"shift_invariant"},
    cost=Cost("B*T*M*(M + 5*D + 192)", "2*H*D*D"),
    claim="Constant state, which tiles of tokens carry exactly; `python -m benchmarks.linear` measures the time: "
    "tests/linear/test_lightning.py::test_the_state_does_not_grow, "
    "tests/linear/test_lightning.py::test_core_equals_the_loops.",
    differs=("The gate's activation is an option; the released weights have none.",),
    verified="third-party",
    defaults={
        "bias": "code",
        "depth": "ours, the first layer's",
        "position": "paper, abstract",
        "gate": "code",
        "eps": "code",
    },
)

GATES: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda u: u, "silu": F.silu, "sigmoid": torch.sigmoid}


@checked()
def lightning_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B G T V"],
    rates: Float[Tensor, " H"],
    *,
    keep: Bool[Tensor, "B T"] | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
) -> Scan:
    """The core: sum_{u<=t} exp(-rates (t - u)) (q_t . k_u) v_u. Hidden tokens add nothing, but time goes on.

    `starts` are those of `linear_scan`.
    """
    check_inputs(q, k, v)
    q, k, v = widened(q, k, v)
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(hide(v, keep), q.shape[1])
    return linear_scan(q, k, v, -rates.to(q.dtype), state=state, starts=starts)


def lrpe(x: Float[Tensor, "B H T D"], theta: Float[Tensor, "H 1 D"], first: int = 0) -> Float[Tensor, "B H T D2"]:
    """[x cos(t theta), x sin(t theta)], t = first, first + 1, ..: products depend on t - u only."""
    (x,) = widened(x)
    # After a million tokens an angle in float32 is off by 0.06; Apple's devices have nothing wider.
    wide = x.dtype if x.device.type == "mps" else torch.float64
    t = torch.arange(first, first + x.shape[2], device=x.device, dtype=wide)
    angle = t[:, None] * theta.to(wide)
    return torch.cat([x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)], -1)


class LightningState(NamedTuple):
    """All the past leaves behind: one matrix a head, and how many tokens there were."""

    kv: Float[Tensor, "B H K V"]
    length: int


@CARD.module
class LightningAttention(RecurrentMixer):
    """The TransNormerLLM token mixer.

    Args:
        dim, num_heads, num_kv_heads, head_dim, bias: as of `HeadMixer`.
        depth: l / (L - 1) of layer l of L: the first layer forgets fastest, the last hardly at all.
        position: "lrpe" rotates queries and keys, with learned angles; "none" leaves it to the decay.
        gate: what the gate u goes through.
        eps: of the root mean square.
    """

    resets = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        depth: float = 0.0,
        position: Literal["lrpe", "none"] = "lrpe",
        gate: Literal["identity", "silu", "sigmoid"] = "identity",
        eps: float = 1e-6,
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, causal=True, bias=bias)
        number(self, least=0, most=1, depth=depth)
        number(self, least=0, eps=eps)
        choice(self, ("lrpe", "none"), position=position)
        choice(self, GATES, gate=gate)
        D = self.head_dim
        self.gate, self.eps = gate, eps
        slopes = alibi_slopes(num_heads, device=torch.device("cpu"), dtype=torch.float64)  # never on meta
        self.rates = tuple(s * (1 - depth + 1e-5) for s in slopes.tolist())
        self.gate_proj = nn.Linear(dim, num_heads * D, bias=bias)
        angles = torch.empty(num_heads, 1, D)
        self.theta: nn.Parameter | None = nn.Parameter(angles) if position == "lrpe" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """theta_hd = 10000^(-2 (h D + d) / (H D)); the projections reset themselves."""
        if self.theta is not None:
            H, D = self.num_heads, self.head_dim
            at = torch.arange(H * D, device=self.theta.device, dtype=torch.float32)
            with torch.no_grad():
                self.theta.copy_((10000.0 ** (-2 * at / (H * D))).view(H, 1, D))

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate travels beside the queries, with which it shares the token."""
        q, k, v = super().split(x, source)
        gate = self.gate_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return torch.cat([q, gate], -1), k, v

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Tensor | None,
        state: LightningState | None,
        *,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, LightningState]:
        q, k, v = widened(q, k, v)
        q, gate = q.chunk(2, -1)
        q, k, v = F.silu(q), repeat_heads(F.silu(k), self.num_heads), repeat_heads(v, self.num_heads)
        kv, first = (None, 0) if state is None else state
        if self.theta is not None:
            q, k = lrpe(q, self.theta, first), lrpe(k, self.theta, first)
        rates = torch.tensor(self.rates, device=q.device, dtype=q.dtype)
        out, kv = lightning_attention(q, k, v, rates, keep=keep, state=kv, starts=starts)
        out = out * torch.rsqrt(out.square().mean((1, 3), keepdim=True) + self.eps)
        return out * GATES[self.gate](gate), LightningState(kv, first + k.shape[2])

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> LightningState:
        K = self.head_dim * (1 if self.theta is None else 2)
        return LightningState(torch.zeros(batch_size, self.num_heads, K, self.head_dim, device=device, dtype=dtype), 0)
