"""Retention: linear attention that forgets at a fixed rate, another in each head, with rotated keys."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, flag, number, refuse
from regard.kernels.check import check_inputs
from regard.kernels.linear_scan import Scan, linear_scan
from regard.linear._scanned import Past, ScannedMixer, ScanState, widths
from regard.linear._shared import hide, repeat_heads, widened
from regard.positions._shared import angles, frequencies
from regard.positions.rotary import rotate

CARD = Card(
    "retnet",
    equation="""q, k, v = x W_q, x W_k, x W_v;   q_t, k_t turned by t, pair by pair, as rotary positions do
o_t = sum_{u<=t} gamma_h^(t-u) (q_t . k_u / sqrt(D)) v_u,   gamma_h = 1 - 2^(-5-h),  h = 0 .. H-1
y_t = W_o (w * o_t / sqrt(mean(o_t^2) + eps) * silu(x_t W_g)), each head by itself
streaming:  S <- gamma_h S + k_t^T v_t,   o_t = q_t S / sqrt(D)""",
    papers=(
        Paper(
            "Retentive Network: A Successor to Transformer for Large Language Models",
            "Sun et al.",
            2023,
            "2307.08621",
            "abstract; official code (torchscale), and the layer of flash-linear-attention",
        ),
    ),
    supports={"causal", "padding", "packed", "streaming", "compile"},
    traits={"shift_invariant", "head_independent"},
    cost=Cost("B*T*M*(value_expand*M + 64 + 64*value_expand + 2.3*D*value_expand)", "2*H*D*D"),
    claim="A token d steps back counts gamma^d times as much, in a state that does not grow: "
    "tests/linear/test_retnet.py::test_what_is_far_counts_gamma_to_the_distance.",
    differs=(
        "The paper's norms of scores and decays are left out: the norm of each head cancels them, but for eps.",
        'The paper\'s group norm is norm="group"; the code published with it, and others, have a root mean square.',
        "Pairs that turn are half a head apart, as in flash-linear-attention; in torchscale they are neighbours.",
        "Projections start as torch's do, where torchscale's start smaller.",
    ),
    verified="third-party",
    tries={"decays": "spread"},
    defaults={
        "key_expand": "code",
        "value_expand": "code",
        "rotary": "code",
        "gate": "code",
        "decays": "code",
        "norm": "code",
        "eps": "code, flash-linear-attention",
    },
)


@checked()
def retention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T V"],
    log_gamma: Float[Tensor, " H"],
    *,
    keep: Bool[Tensor, "B T"] | None = None,
    state: Float[Tensor, "B H D V"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
) -> Scan:
    """sum_{u<=t} exp(log_gamma (t - u)) (q_t . k_u / sqrt(D)) v_u. Hidden tokens add nothing, but time goes on.

    Args:
        log_gamma: logarithms, <= 0, one a head.
        state: what the call before gave; zero by default.
        starts: those of `linear_scan`.

    Raises:
        ValueError: shapes that don't fit together.
    """
    check_inputs(q, k, v)
    H, scale = q.shape[1], 1 / math.sqrt(q.shape[3])
    q, k, v = widened(q, k, v)
    k, v = repeat_heads(hide(k, keep), H), repeat_heads(hide(v, keep), H)
    return linear_scan(scale * q, k, v, log_gamma.to(q.dtype), state=state, starts=starts)


def log_gammas(decays: Literal["powers", "spread"], heads: int) -> list[float]:
    """log gamma_h: "powers" has 1 - 2^(-5-h), "spread" 1 - gamma evenly in its logarithm from 1/32 to 1/512."""
    if decays == "powers":
        return [math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)]
    steps = [h / max(1, heads - 1) for h in range(heads)]
    return [math.log1p(-math.exp((1 - s) * math.log(1 / 32) + s * math.log(1 / 512))) for s in steps]


class RetentionState(NamedTuple):
    """All that the past leaves behind: one matrix a head, and how many tokens there were."""

    kv: Float[Tensor, "B H D V"]
    length: int


@CARD.module
class RetNet(ScannedMixer):
    """Multi-scale retention, the token mixer of RetNet.

    Args:
        dim, num_heads: M and H.
        key_expand, value_expand: width of all keys, and of all values, in terms of M.
        rotary: whether queries and keys are turned by their positions; D is then even.
        gate: whether silu(x W_g) multiplies what the norm gives.
        decays: "powers", the paper's; "spread", another schedule in use; or gamma of each head, above 0 and up to 1.
        norm: "rms", or "group", which takes the mean off first.
        eps: of the norm.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        key_expand: float = 1.0,
        value_expand: float = 2.0,
        rotary: bool = True,
        gate: bool = True,
        decays: Literal["powers", "spread"] | Sequence[float] = "powers",
        norm: Literal["rms", "group"] = "rms",
        eps: float = 1e-5,
    ) -> None:
        who, H = type(self).__name__, num_heads
        D, V = widths(who, dim, H, key_expand=key_expand, value_expand=value_expand)
        flag(who, rotary=rotary)
        choice(who, ("rms", "group"), norm=norm)
        if rotary and D % 2:
            refuse(who, "key_expand", "gives keys of an odd width, whose pairs can't turn", D, "even, or rotary=False")
        if isinstance(decays, str):
            choice(who, ("powers", "spread"), decays=decays)
            self.log_gamma = tuple(log_gammas(decays, H))  # type: ignore[arg-type]
        else:
            number(who, above=0, most=1, **{f"decays[{h}]": gamma for h, gamma in enumerate(decays)})
            if len(decays) != H:
                refuse(who, "decays", "are not one a head", len(decays), str(H))
            self.log_gamma = tuple(math.log(gamma) for gamma in decays)
        shape = {"query_heads": H, "key_heads": H, "value_heads": H, "key_dim": D, "value_dim": V}
        super().__init__(dim, H, **shape, conv_size=0, gate=gate, eps=eps)
        self.rotary, self.norm = rotary, norm
        self.reset_parameters()

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Tensor | None,
        state: RetentionState | None,
        *,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, RetentionState]:
        first = 0 if state is None else state.length
        if self.rotary:
            v = self.turned(v, first)
        past = None if state is None else ScanState(state.kv, v[:, 0, :0])
        out, after = super().run(q, k, v, keep, past, starts=starts)
        return out, RetentionState(after.kv, first + v.shape[2])

    def turned(self, mixed: Float[Tensor, "B one T C"], first: int) -> Float[Tensor, "B one T C"]:
        """Queries and keys of all heads by their positions, the first of which is `first`."""
        (mixed,) = widened(mixed)
        D, (q, k, _) = self.head_dim, self.widths
        heads = mixed[:, 0, :, : q + k].unflatten(-1, (-1, D)).transpose(1, 2)
        at = torch.arange(first, first + mixed.shape[2], device=mixed.device)
        heads = rotate(heads, angles(at, frequencies(D, 10000.0, mixed.device)))
        return torch.cat([heads.transpose(1, 2).flatten(2)[:, None], mixed[..., q + k :]], -1)

    def scan(self, q: Tensor, k: Tensor, v: Tensor, told: Tensor, **past: Unpack[Past]) -> Scan:
        rates = torch.tensor(self.log_gamma, device=q.device, dtype=q.dtype)
        return retention(q, k, v, rates, **past)

    def normed(self, out: Tensor, gate: Tensor) -> Tensor:
        return super().normed(out - out.mean(-1, keepdim=True) if self.norm == "group" else out, gate)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> RetentionState:
        return RetentionState(super().empty_state(batch_size, device=device, dtype=dtype).kv, 0)
