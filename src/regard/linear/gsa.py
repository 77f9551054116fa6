"""Gated slot attention: softmax over a few slots, each a moving average of keys and values."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, flag, number, whole
from regard.kernels.check import check_inputs
from regard.kernels.column_scan import column_scan
from regard.kernels.linear_scan import Scan, linear_scan
from regard.kernels.max_scan import EMPTY
from regard.linear._running import means
from regard.linear._scanned import Past, ScannedMixer, ScanState, widths
from regard.linear._shared import hide, repeat_heads, widened
from regard.shapes import head_shape

CARD = Card(
    "gsa",
    equation="""q, k, v = silu(x W_q), silu(x W_k), silu(x W_v);   f_t = log(sigmoid(x_t W_f)) / 8, one a head and slot
K_t = diag(exp(f_t)) K_{t-1} + (1 - exp(f_t))^T k_t,   V_t likewise of v_t        (each head, m slots)
o_t = softmax(c q_t K_t^T) V_t,   c = 1        (over slots)
y_t = W_o (w * u_t / sqrt(mean(u_t^2) + eps)),   u_t = silu(o_t) of all heads side by side""",
    papers=(
        Paper(
            "Gated Slot Attention for Efficient Linear-Time Sequence Modeling",
            "Zhang et al.",
            2024,
            "2409.07146",
            "abstract; official code (layer and naive functions of flash-linear-attention)",
        ),
        Paper(
            "ABC: Attention with Bounded-memory Control",
            "Peng et al.",
            2021,
            "2110.02488",
            "its memory, in that code; not the paper's own text",
        ),
    ),
    supports={"causal", "padding", "packed", "gqa", "streaming", "compile"},
    traits={"shift_invariant"},
    cost=Cost(
        "B*T*(G*slots*M + H*slots*(64 + 2.3*D*(key_expand + value_expand)) + 64*M*(key_expand + value_expand))",
        "H*slots*D*(key_expand + value_expand)",
    ),
    claim="Slots, whose number is constant, are what a query chooses among: with one it has no choice, and reads a "
    "running mean that fades: tests/linear/test_gsa.py::test_one_slot_is_a_running_mean.",
    differs=(
        "Hidden tokens pass the slots on; the authors' code takes padding out of the sequence.",
        "abc=True has the slots of attention with bounded-memory control in this layer; rotary positions and the gate "
        "of its own layer are left out.",
        "Learned feature maps (T2R), which finetuned models start from, are left out.",
        "Matrices start as torch's do, as in the layer alone; the authors' models draw them with deviation 0.02.",
    ),
    verified="third-party",
    example={"slots": 5},
    tries={"conv_size": 3},
    defaults={
        "slots": "code, as many as a head is wide",
        "temperature": "code",
        "feature_map": "code",
        "scale": "code",
        "key_expand": "code",
        "value_expand": "code",
        "conv_size": "code",
        "abc": "ours, the newer paper's",
        "eps": "code",
    },
)

MAPS: dict[str | None, Callable[[Tensor], Tensor]] = {None: lambda z: z, "relu": F.relu, "silu": F.silu}


class Slots(NamedTuple):
    """What the slots hold."""

    keys: Float[Tensor, "B H m D"]
    values: Float[Tensor, "B H m V"]


class Slotted(NamedTuple):
    """What came out, and what the slots hold after it."""

    out: Float[Tensor, "B H T V"]
    state: Slots


@checked()
def slot_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T V"],
    write: Float[Tensor, "B G T m"],
    decay: Float[Tensor, "B G T m"],
    *,
    scale: float | None = None,
    keep: Bool[Tensor, "B T"] | None = None,
    state: Slots | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
) -> Slotted:
    """o_t = softmax(scale q_t K_t^T) V_t, K_t = diag(exp(decay_t)) K_{t-1} + write_t^T k_t, V_t likewise, and the last.

    Two scans with a softmax between: what is forgotten belongs to outputs of the first and to inputs of the second.
    Each key head serves H / G query heads that follow one another. Hidden tokens pass the slots on. Sums are in float32
    at least.

    Args:
        write: how much of the token each slot takes.
        decay: logarithms, <= 0, of what it keeps; write = 1 - exp(decay) makes it a moving average.
        scale: default 1 / sqrt(D).
        state: what the call before gave; empty slots, which hold 0, by default.
        starts: those of `linear_scan`.

    Raises:
        ValueError: shapes that don't fit together.
    """
    check_inputs(q, k, v)
    H, scale = q.shape[1], 1 / math.sqrt(q.shape[3]) if scale is None else scale
    q, k, v, write, decay = widened(q, k, v, write, decay)
    k, v = repeat_heads(k, H), repeat_heads(v, H)
    write, decay = (repeat_heads(hide(z, keep), H) for z in (write, decay))
    keys, values = (None, None) if state is None else (state.keys.mT, state.values)
    logits, keys = column_scan(scale * q, k, write, decay, state=keys, starts=starts)
    out, values = linear_scan(logits.softmax(-1), write, v, decay, state=values, starts=starts)
    return Slotted(out, Slots(keys.mT, values))


@CARD.module
class GatedSlotAttention(ScannedMixer):
    """The token mixer of GSA.

    Args:
        dim, num_heads, num_kv_heads: M, H, and G heads of keys, values and gates.
        slots: m; default D.
        temperature: logarithms of what is kept are divided by it, so that a new layer forgets little.
        feature_map: what queries and keys go through.
        scale: c.
        key_expand, value_expand: width of all queries, and of all outputs, in terms of M.
        conv_size: taps of a convolution with silu on queries, keys and values; 0: neither.
        abc: slots are means of all the past by weights exp(x_t W_f), and forget nothing; there is no temperature.
        eps: of the root mean square.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        slots: int | None = None,
        temperature: float = 8.0,
        feature_map: Literal["relu", "silu"] | None = "silu",
        scale: float = 1.0,
        key_expand: float = 1.0,
        value_expand: float = 1.0,
        conv_size: int = 0,
        abc: bool = False,
        eps: float = 1e-5,
    ) -> None:
        who, H = type(self).__name__, num_heads
        D, V = widths(who, dim, H, key_expand=key_expand, value_expand=value_expand)
        G = head_shape(dim, H, num_kv_heads, D, who=who).num_kv_heads
        slots = D if slots is None else slots
        whole(who, slots=slots)
        number(who, above=0, temperature=temperature, scale=scale)
        choice(who, MAPS, feature_map=feature_map)
        flag(who, abc=abc)
        shape = {"query_heads": H, "key_heads": G, "value_heads": G, "key_dim": D, "value_dim": V}
        super().__init__(dim, H, **shape, conv_size=conv_size, gate=False, eps=eps)
        self.slots, self.temperature, self.feature_map, self.scale, self.abc = (
            slots,
            temperature,
            feature_map,
            scale,
            abc,
        )
        self.norm_weight = nn.Parameter(torch.empty(H * V))
        self.slot_proj = nn.Linear(dim, G * slots, bias=False)
        self.reset_parameters()

    def told(self, x: Tensor) -> Tensor:
        return self.slot_proj(x)

    def scan(self, q: Tensor, k: Tensor, v: Tensor, told: Tensor, **past: Unpack[Past]) -> Scan:
        logits, features = told.unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2), MAPS[self.feature_map]
        keep, starts, held = past["keep"], past["starts"], past["state"]
        widths = (self.head_dim, self.value_dim, int(self.abc))
        keys, values, total = (None, None, None) if held is None else held.split(widths, -1)
        if self.abc:
            each = self.num_heads // self.num_kv_heads
            total = None if total is None else total[:, ::each, :, 0]
            write, decay, total = means(logits, total, keep=keep, starts=starts)
            total = total.repeat_interleave(each, 1)[..., None]
        else:
            decay = F.logsigmoid(logits) / self.temperature
            write = -torch.expm1(decay)
        state = None if keys is None or values is None else Slots(keys, values)
        given = features(q), features(k), F.silu(v), write, decay
        out, after = slot_attention(*given, scale=self.scale, keep=keep, state=state, starts=starts)
        return Scan(out, torch.cat([*after, total] if self.abc and total is not None else [*after], -1))

    def normed(self, out: Tensor, gate: Tensor) -> Tensor:
        """silu, over the root mean square of all heads together."""
        out = F.silu(out)
        out = out * torch.rsqrt(out.square().mean((1, 3), keepdim=True) + self.eps)
        return out * self.norm_weight.to(out.dtype).view(self.num_heads, 1, -1)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> ScanState:
        """Keys and values of the slots side by side, and with `abc` the logarithm of the sum of weights."""
        width = self.head_dim + self.value_dim + int(self.abc)
        slots = torch.zeros(batch_size, self.num_heads, self.slots, width, device=device, dtype=dtype)
        if self.abc:
            slots[..., -1] = EMPTY
        past = max(0, self.conv_size - 1)
        return ScanState(slots, torch.zeros(batch_size, past, sum(self.widths), device=device, dtype=dtype))
