"""RWKV-4: each channel takes a mean of its values, by weights that fade at a rate of its own."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, whole
from regard.kernels.channel_scan import channel_scan
from regard.kernels.max_scan import EMPTY, max_scan
from regard.linear._rwkv import TimeMixer, mixed, ramp, zigzag
from regard.linear._shared import widened
from regard.tracing import as_it_is
from regard.weights import Loaded, reshaped, same

CARD = Card(
    "rwkv4",
    equation="""k, v, r = x^k W_k, x^v W_v, x^r W_r,   x^z_t = m_z x_t + (1 - m_z) x_{t-1}
wkv_t = (sum_{j<t} exp(k_j - (t-1-j) w) v_j + exp(k_t + u) v_t) / (the same sum without v)       (each channel, w > 0)
y_t = W_o (sigmoid(r_t) * wkv_t)
channel mix:  y_t = sigmoid(x^r W_r) * relu(x^k W_k)^2 W_v, with shares m and matrices of its own""",
    papers=(
        Paper(
            "RWKV: Reinventing RNNs for the Transformer Era",
            "Peng et al.",
            2023,
            "2305.13048",
            "official code (RWKV-v4neo/src/model.py); the layer of transformers; not the paper's own text",
        ),
    ),
    supports={"causal", "padding", "packed", "streaming", "compile"},
    traits={"shift_invariant"},
    cost=Cost("B*T*M*(width + min(1, channel_mix)*M + 2*channel_mix)", "3*width + M*(1 + min(1, channel_mix))"),
    claim="What a token d steps back weighs falls by exp(-w) a step, in every channel at its own rate w, and weights "
    "never overflow: tests/linear/test_rwkv4.py::test_each_channel_forgets_at_its_own_rate.",
    differs=(
        "Matrices start as torch's do, where the released code starts those of keys, receptance and output at 0.",
        "The bonus u starts at log 0.3 and a zigzag, as in the authors' code; transformers starts it at 1.",
        "The norm of the embedding, in the released model's first block, is left to the model.",
    ),
    verified="third-party",
    example={"width": 30, "layers": 4, "layer": 2, "channel_mix": 40},
    tries={"layers": {"layers": 5, "layer": 2}, "layer": {"layers": 4, "layer": 3}},
    defaults={
        "width": "code",
        "layers": "ours, one",
        "layer": "ours, the first",
        "channel_mix": "ours, none; the released models' is 4 M",
    },
)


class WKVState(NamedTuple):
    """Sums over the past with weights exp(k_j - (t - j) w - top), which is the greatest such exponent."""

    numerator: Float[Tensor, "B A"]
    denominator: Float[Tensor, "B A"]
    top: Float[Tensor, "B A"]


class WKV(NamedTuple):
    """What came out, and all that the past leaves behind."""

    out: Float[Tensor, "B T A"]
    state: WKVState


@checked()
def wkv(
    k: Float[Tensor, "B T A"],
    v: Float[Tensor, "B T A"],
    rate: Float[Tensor, " A"],
    bonus: Float[Tensor, " A"],
    *,
    keep: Bool[Tensor, "B T"] | None = None,
    state: WKVState | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
) -> WKV:
    """Each channel's softmax over the past, of logits k_j - (t-1-j) rate, and k_t + bonus for the token itself.

    No weight overflows, whatever the keys: all are scaled by the greatest. Hidden tokens leave nothing behind, and no
    time passes over them. In at least float32.

    Args:
        rate: > 0, what a logit loses a step.
        state: what the call before gave; None: nothing came before.
        starts: True at the first token of each packed document, as in `linear_scan`.

    Raises:
        ValueError: shapes that don't fit together.
    """
    k, v, rate, bonus = widened(k, v, rate, bonus)
    T, none = k.shape[1], k.new_zeros(k.shape[0], k.shape[2])
    numerator, denominator, top = (none, none, none + EMPTY) if state is None else state
    written, lost = k, -rate.expand_as(k)
    if keep is not None:
        written, lost = written.masked_fill(~keep[..., None], EMPTY), lost.masked_fill(~keep[..., None], 0)
    # Weights don't depend on what they are scaled by, nor do gradients.
    tops, last = max_scan(written.detach(), lost.detach(), state=top.detach(), starts=starts)
    before = _before(tops, top.detach(), starts, EMPTY)
    weight = (written - tops).exp()
    if keep is not None:
        weight = weight.masked_fill(~keep[..., None], 0)
    given, fades = torch.cat([weight * v, weight], -1), (before - tops) + lost
    past = torch.cat([numerator, denominator], -1).to(k.dtype)
    sums, end = channel_scan(given, torch.cat([fades, fades], -1), state=past, starts=starts)
    numerator, denominator = _before(sums, past, starts, 0.0).chunk(2, -1)
    most = torch.maximum(before, (k + bonus).detach())
    old, own = (before - most).exp(), (k + bonus - most).exp()
    out = (old * numerator + own * v) / (old * denominator + own)
    numerator, denominator = end.chunk(2, -1)
    return WKV(out, WKVState(numerator, denominator, last if T else top))


def _before(after: Tensor, first: Tensor, starts: Tensor | None, empty: float) -> Tensor:
    """What stood there before each token."""
    before = torch.cat([first[:, None].to(after.dtype), after], 1)[:, : after.shape[1]]
    return before if starts is None else before.masked_fill(starts[..., None], empty)


class RWKV4State(NamedTuple):
    """All the past leaves behind, whatever its length."""

    numerator: Float[Tensor, "B A"]
    denominator: Float[Tensor, "B A"]
    top: Float[Tensor, "B A"]
    last: Float[Tensor, "B one M"]
    """The last token, for the time mix."""
    channel: Float[Tensor, "B any M"]
    """The same for the channel mix; none without one."""


@CARD.module
class RWKV4(TimeMixer):
    """The time mix of RWKV-4, or a whole block.

    Args:
        dim: M.
        width: A, channels of the time mix; default M.
        layers, layer: L, and which of them this is, from 0; starting values depend on both.
        channel_mix: width of the channel mix of a whole block, x <- x + time_mix(LN(x)), x <- x + channel_mix(LN(x)).
            0: the time mix alone, with neither norm nor residual.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self, dim: int, *, width: int | None = None, layers: int = 1, layer: int = 0, channel_mix: int = 0
    ) -> None:
        super().__init__(dim, layers=layers, layer=layer, channel_mix=channel_mix)
        width = dim if width is None else width
        whole(self, width=width)
        self.width = width
        self.mix_k, self.mix_v, self.mix_r = (nn.Parameter(torch.empty(dim)) for _ in "kvr")
        self.k_proj = nn.Linear(dim, width, bias=False)
        self.v_proj = nn.Linear(dim, width, bias=False)
        self.r_proj = nn.Linear(dim, width, bias=False)
        self.o_proj = nn.Linear(width, dim, bias=False)
        self.log_rate = nn.Parameter(torch.empty(width))
        self.bonus = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Later channels forget faster and look less at the token before, upper layers too; matrices as torch's."""
        deep, rest = self.depth
        self.mix_k.copy_(ramp(self.mix_k).pow(rest))
        self.mix_v.copy_(ramp(self.mix_v).pow(rest) + 0.3 * deep)
        self.mix_r.copy_(ramp(self.mix_r).pow(rest / 2))
        self.log_rate.copy_(-5 + 8 * ramp(self.log_rate, 1).pow(0.7 + 1.3 * deep))
        self.bonus.copy_(math.log(0.3) + 0.5 * zigzag(self.bonus))
        if self.ffn is not None:
            self.ffn.start(rest)

    def extra_repr(self) -> str:
        return f"{self.dim}, width={self.width}, layer {self.layer} of {self.layers}"

    def time_mix(
        self, x: Tensor, state: RWKV4State | None, keep: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, RWKV4State]:
        shares = self.mix_k, self.mix_v, self.mix_r
        (k, v, r), last = mixed(x, shares, state=None if state is None else state.last, keep=keep, starts=starts)
        k, v, r = self.k_proj(k), self.v_proj(v), self.r_proj(r)
        with as_it_is(x.device):
            sums = None if state is None else WKVState(*state[:3])
            rate = widened(self.log_rate)[0].exp()
            out, sums = wkv(k, v, rate, self.bonus, keep=keep, state=sums, starts=starts)
            out = (torch.sigmoid(r) * out).to(r.dtype)
        return self.o_proj(out), RWKV4State(*sums, last, last[:, :0])

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> RWKV4State:
        none = torch.zeros(3, batch_size, self.width, device=device, dtype=dtype)
        last = torch.zeros(batch_size, 1, self.dim, device=device, dtype=dtype)
        channel = last[:, : min(1, self.channel_mix)].clone()
        return RWKV4State(none[0], none[1].clone(), none[2] + EMPTY, last, channel)


@CARD.loads("transformers", "RwkvSelfAttention")
def _rwkv(theirs: Any) -> Loaded:
    names = {"k_proj": "key", "v_proj": "value", "r_proj": "receptance", "o_proj": "output"}
    names |= {"log_rate": "time_decay", "bonus": "time_first"}
    shares = [
        reshaped(f"mix_{own}", f"time_mix_{their}", lambda m: m.flatten(), lambda m: m.view(1, 1, -1))
        for own, their in (("k", "key"), ("v", "value"), ("r", "receptance"))
    ]
    config, width = theirs.config, theirs.attention_hidden_size
    options = {"layers": config.num_hidden_layers, "layer": theirs.layer_id}
    return Loaded(lambda: RWKV4(config.hidden_size, width=width, **options), [*same(theirs, names), *shares])
