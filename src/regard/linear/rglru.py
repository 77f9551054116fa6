"""The real-gated linear recurrent unit (Griffin, Hawk): each channel is a sum that forgets by content."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, divides, number, refuse, whole
from regard.kernels.channel_scan import Channels, channel_scan
from regard.linear._recurrence import Recurrence, conv_of_real
from regard.linear._shared import widened
from regard.tracing import as_it_is
from regard.weights import Loaded, reshaped, same

CARD = Card(
    "rglru",
    equation="""y = gelu(x W_y + b_y),   u = conv(x W_x + b_x) + b  (4 taps, each channel by itself)
i = sigmoid(u G_i + b_i),   r = sigmoid(u G_r + b_r)      (G_i, G_r: H blocks on the diagonal)
a_t = exp(-c r_t softplus(Lambda)),   h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t
out = (h * y) W_o + b_o;   h_t = i_t u_t for the first token of a document""",
    papers=(
        Paper(
            "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models",
            "De et al.",
            2024,
            "2402.19427",
            "official code (recurrentgemma/torch/layers.py); the layer of transformers",
        ),
    ),
    supports={"causal", "padding", "packed", "streaming", "compile"},
    traits={"shift_invariant"},
    cost=Cost("2*B*T*width*(M + width/H)", "width*conv_size + 1"),
    claim="However slowly it forgets, its sum keeps the variance of what goes in, and with its gates closed a token "
    "is read unchanged a thousand tokens on: tests/linear/test_rglru.py::test_variance_is_kept, "
    "tests/linear/test_rglru.py::test_closed_gates_forget_nothing.",
    differs=(
        "A document's first tokens don't see the document before through the convolution, as in the authors' code; "
        "transformers' layer lets them.",
        "Lambda starts as in the authors' code, which spreads a and not a^c between 0.9 and 0.999; the output "
        "projection starts with variance 1 / width, which the authors' code also divides by the number of layers.",
        "The hybrid with window attention in every third layer is left to the model that stacks the layers.",
    ),
    verified="third-party",
    example={"width": 30},
    defaults={"width": "code", "conv_size": "code", "c": "code"},
)


def bounded_root(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """sqrt(x) for x >= 0, with a slope of at most 1000: no gradient is infinite where nothing is forgotten."""
    small = 4 * x < 1e-6
    steep = x.detach().sqrt() + 1000 * (x - x.detach())
    return torch.where(small, steep, torch.where(small, 1.0, x).sqrt())


@checked()
def gated_recurrence(
    u: Float[Tensor, "B T W"],
    log_decay: Float[Tensor, "B T W"],
    *,
    state: Float[Tensor, "B W"] | None = None,
    first: Bool[Tensor, "B T"] | None = None,
) -> Channels:
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) u_t with a = exp(log_decay), and the last h, in at least float32.

    Args:
        log_decay: <= 0; where it is 0, the token adds nothing.
        state: h before the first token; zero by default.
        first: True at first tokens, where h_t = u_t.
    """
    u, log_decay = widened(u, log_decay)
    share = bounded_root(-torch.expm1(2 * log_decay))
    if first is not None:
        share = torch.where(first[..., None], 1.0, share)
    return channel_scan(share * u, log_decay, state=state, starts=first)


def firsts(real: Bool[Tensor, "B T"], starts: Bool[Tensor, "#B T"] | None) -> Bool[Tensor, "B T"]:
    """The first real token of the row, or of each document in it."""
    count = real.long().cumsum(1)
    if starts is not None:
        count = count - torch.where(starts, count - real.long(), 0).cummax(1).values
    return real & (count == 1)


class RGLRUState(NamedTuple):
    """All the past leaves behind, whatever its length."""

    h: Float[Tensor, "B W"]
    inputs: Float[Tensor, "B past W"]
    """The last inputs of the convolution."""
    begun: Bool[Tensor, " B"]
    """Whether there was a token."""


@CARD.module
class RGLRU(Recurrence):
    """Griffin's recurrent block.

    Args:
        dim, num_heads: M, and H blocks of the gates' matrices.
        width: W, channels of the recurrence; default M.
        conv_size: taps of the convolution, the token itself included.
        c: how much an open gate forgets.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self, dim: int, num_heads: int, *, width: int | None = None, conv_size: int = 4, c: float = 8.0
    ) -> None:
        super().__init__()
        width = dim if width is None else width
        whole(self, dim=dim, num_heads=num_heads, width=width, conv_size=conv_size)
        divides(self, num_heads=num_heads, width=width)
        number(self, above=0, c=c)
        self.dim, self.width, self.num_heads, self.c = dim, width, num_heads, c
        self.in_proj = nn.Linear(dim, width)
        self.gate_proj = nn.Linear(dim, width)
        self.taps = nn.Parameter(torch.empty(width, conv_size))
        self.taps_bias = nn.Parameter(torch.empty(width))
        block = width // num_heads
        for name in ("input", "forget"):
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.empty(num_heads, block, block)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(num_heads, block)))
        self.rate = nn.Parameter(torch.empty(width))
        self.o_proj = nn.Linear(width, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Small taps; a^2 uniform between 0.9^2 and 0.999^2 where r = 1 / c; matrices of variance 1 / inputs."""
        for linear in (self.in_proj, self.gate_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.taps, std=math.sqrt(0.01 / self.taps.shape[1]))
        nn.init.zeros_(self.taps_bias)
        for name in ("input", "forget"):
            nn.init.normal_(getattr(self, f"{name}_weight"), std=(self.width // self.num_heads) ** -0.5)
            nn.init.zeros_(getattr(self, f"{name}_bias"))
        square = torch.empty_like(self.rate, dtype=torch.float32).uniform_(0.9**2, 0.999**2)
        self.rate.copy_(torch.expm1(-square.log() / 2).log())  # the softplus of which is -log a

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, width={self.width}, c={self.c}"

    def run(
        self, x: Tensor, state: RGLRUState | None, keep: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, RGLRUState]:
        projected, gate = self.in_proj(x), F.gelu(self.gate_proj(x), approximate="tanh")
        with as_it_is(x.device):
            (wide,) = widened(projected)
            h, inputs, begun = (None, None, None) if state is None else state
            u, inputs = conv_of_real(wide, self.taps, self.taps_bias, state=inputs, keep=keep, starts=starts)
            opened, forgets = self.opening("input", u), self.opening("forget", u)
            log_decay = -self.c * forgets * F.softplus(self.rate.to(u.dtype))
            u = opened * u
            if keep is not None:
                u, log_decay = (z.masked_fill(~keep[..., None], 0) for z in (u, log_decay))
            real = x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
            first = firsts(real, starts)
            if begun is not None:
                first = first & ~begun[:, None]
            h, last = gated_recurrence(u, log_decay, state=h, first=first)
            begun = real.any(1) if begun is None else begun | real.any(1)
        return self.o_proj(h.to(gate.dtype) * gate), RGLRUState(last, inputs, begun)

    def opening(self, name: str, u: Float[Tensor, "B T W"]) -> Float[Tensor, "B T W"]:
        """A gate of the convolved tokens, block by block."""
        weight, bias = (getattr(self, f"{name}_{kind}").to(u.dtype) for kind in ("weight", "bias"))
        blocks = torch.einsum("bthi,hij->bthj", u.unflatten(-1, (self.num_heads, -1)), weight)
        return (blocks + bias).flatten(2).sigmoid()

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> RGLRUState:
        h = torch.zeros(batch_size, self.width, device=device, dtype=dtype)
        inputs = torch.zeros(batch_size, self.taps.shape[1] - 1, self.width, device=device, dtype=dtype)
        return RGLRUState(h, inputs, torch.zeros(batch_size, device=device, dtype=torch.bool))


@CARD.loads("transformers", "RecurrentGemmaRecurrentBlock")
def _griffin(theirs: Any) -> Loaded:
    if "Tanh" not in (kind := type(theirs.act_fn).__name__):
        refuse(theirs, "hidden_activation", "has no counterpart here", kind, "gelu_pytorch_tanh")
    names = {"in_proj": "linear_x", "gate_proj": "linear_y", "o_proj": "linear_out", "taps_bias": "conv_1d.bias"}
    names |= {"rate": "rg_lru.recurrent_param"}
    for own, their in (("input", "input_gate"), ("forget", "recurrent_gate")):
        names |= {f"{own}_{kind}": f"rg_lru.{their}_{kind}" for kind in ("weight", "bias")}
    taps = reshaped("taps", "conv_1d.weight", lambda w: w[:, 0], lambda w: w[:, None])
    heads, options = theirs.rg_lru.num_attention_heads, {"width": theirs.lru_width, "conv_size": theirs.conv1d_width}
    return Loaded(lambda: RGLRU(theirs.hidden_size, heads, **options), [*same(theirs, names), taps])
