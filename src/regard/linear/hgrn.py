"""HGRN: a gated recurrence of each channel, which forgets no faster than bounds that grow by layer."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import number, whole
from regard.kernels.channel_scan import channel_scan
from regard.linear._recurrence import Recurrence, conv_of_real, torch_taps
from regard.linear._shared import widened
from regard.tracing import as_it_is

CARD = Card(
    "hgrn",
    equation="""f = sigmoid(x W_f);  in layer l > 0:  f <- g_l + (1 - g_l) f,   g_l = sum_{0 < m <= l} softmax(b)_m
h_t = f_t h_{t-1} + (1 - f_t) silu(x_t W_i)                      (each channel)
y_t = W_o (w * h_t / sqrt(mean(h_t^2) + eps) * silu(x_t W_g))""",
    papers=(
        Paper(
            "Hierarchically Gated Recurrent Neural Network for Sequence Modeling",
            "Qin, Yang, Zhong",
            2023,
            "2311.04823",
            "layer and plain loop of flash-linear-attention, in part by the same authors; not the paper's own text",
        ),
    ),
    supports={"causal", "padding", "packed", "streaming", "compile"},
    traits={"shift_invariant"},
    cost=Cost("3*B*T*M*width", "width + max(0, conv_size - 1)*2*width"),
    claim="The bounds of upper layers make them remember longer, however hard a token asks to forget: "
    "tests/linear/test_hgrn.py::test_upper_layers_remember_longer.",
    differs=(
        "States are real, as in flash-linear-attention; the paper's first version has complex ones.",
        "Each layer has the table of all layers' bounds, which regard.share makes one; the first layer has none.",
    ),
    example={"width": 30, "layers": 4, "layer": 2, "conv_size": 3},
    tries={"layers": {"layers": 5, "layer": 2}, "layer": {"layers": 4, "layer": 3}},
    defaults={
        "width": "code, flash-linear-attention",
        "layers": "ours, one",
        "layer": "ours, the first",
        "conv_size": "code, flash-linear-attention",
        "eps": "code, flash-linear-attention",
    },
)


def lower_bound(bounds: Float[Tensor, "L W"], layer: int) -> Float[Tensor, " W"]:
    """g_l in [0, 1), which grows from layer to layer: 0 in the first, in the last all but the first one's share."""
    return widened(bounds)[0].softmax(0)[1 : layer + 1].sum(0)


def forget_gate(
    logits: Float[Tensor, "*n W"], bound: Float[Tensor, " W"] | None
) -> tuple[Float[Tensor, "*n W"], Float[Tensor, "*n W"]]:
    """log f and 1 - f for f = bound + (1 - bound) sigmoid(logits), neither as a difference of near numbers."""
    kept, written = F.logsigmoid(logits), torch.sigmoid(-logits)
    if bound is None:
        return kept, written
    return torch.logaddexp(bound.log(), torch.log1p(-bound) + kept), (1 - bound) * written


class Bounds(nn.Module):
    """The table of all layers' bounds, of which layers share one."""

    tied = ("table",)

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(layers, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Bounds grow by equal steps."""
        nn.init.zeros_(self.table)


class BoundedRecurrence(Recurrence):
    """What HGRN and HGRN2 share: logits of a forget gate with a bound, a convolution, an RMS norm over all channels.

    Args:
        inputs: widths of what is projected and convolved, the forget gate's second.
        out: channels that are normed and projected to M.
    """

    def __init__(
        self, dim: int, inputs: tuple[int, ...], out: int, *, layers: int, layer: int, conv_size: int, eps: float
    ) -> None:
        super().__init__()
        whole(self, layers=layers)
        whole(self, 0, most=layers - 1, layer=layer)
        whole(self, 0, conv_size=conv_size)
        number(self, least=0, eps=eps)
        self.dim, self.inputs, self.layers, self.layer, self.eps = dim, inputs, layers, layer, eps
        self.conv_size = conv_size
        self.in_proj = nn.Linear(dim, sum(inputs), bias=False)
        self.taps = nn.Parameter(torch.empty(sum(inputs), conv_size)) if conv_size else None
        self.bounds = Bounds(layers, inputs[1]) if layer else None
        self.norm_weight = nn.Parameter(torch.empty(out))
        self.o_proj = nn.Linear(out, dim, bias=False)

    def reset_parameters(self) -> None:
        """Taps as torch has them, the norm at 1; projections and bounds reset themselves."""
        if self.taps is not None:
            torch_taps(self.taps)
        nn.init.ones_(self.norm_weight)

    def extra_repr(self) -> str:
        return f"{self.dim}, layer {self.layer} of {self.layers}, conv_size={self.conv_size}"

    def read(
        self, x: Tensor, past: Tensor | None, keep: Tensor | None, starts: Tensor | None
    ) -> tuple[list[Float[Tensor, "B T any"]], Tensor, Tensor, Tensor]:
        """What is projected, the forget gate's log f in its second place; 1 - f; and the convolution's last inputs."""
        wide, last = widened(x)[0], x[:, :0]
        if self.taps is not None:
            wide, last = conv_of_real(wide, self.taps, state=past, keep=keep, starts=starts)
        parts = list(wide.split(self.inputs, -1))
        bound = None if self.bounds is None else lower_bound(self.bounds.table, self.layer)
        decay, written = forget_gate(parts[1], bound)
        if keep is not None:
            decay, written = (z.masked_fill(~keep[..., None], 0) for z in (decay, written))
        return parts, decay, written, last

    def normed(self, z: Float[Tensor, "B T W"]) -> Float[Tensor, "B T W"]:
        return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + self.eps) * self.norm_weight

    def empty_inputs(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "B past C"]:
        return torch.zeros(batch_size, max(0, self.conv_size - 1), sum(self.inputs), device=device, dtype=dtype)


class HGRNState(NamedTuple):
    """All the past leaves behind, whatever its length."""

    h: Float[Tensor, "B W"]
    inputs: Float[Tensor, "B past C"]
    """The last inputs of the convolution; none without one."""


@CARD.module
class HGRN(BoundedRecurrence):
    """The HGRN token mixer.

    Args:
        dim: M.
        width: W, channels of the recurrence; default M.
        layers, layer: L, and which of them this is, from 0: the first has no bound. Layers are bound together by
            `regard.share`.
        conv_size: taps of a convolution on the inputs of recurrence and forget gate; 0: none.
        eps: of the root mean square.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int | None = None,
        layers: int = 1,
        layer: int = 0,
        conv_size: int = 0,
        eps: float = 1e-5,
    ) -> None:
        width = dim if width is None else width
        whole(type(self).__name__, dim=dim, width=width)
        sizes = {"layers": layers, "layer": layer, "conv_size": conv_size}
        super().__init__(dim, (width, width), width, **sizes, eps=eps)
        self.width = width
        self.gate_proj = nn.Linear(dim, width, bias=False)
        self.reset_parameters()

    def run(
        self, x: Tensor, state: HGRNState | None, keep: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, HGRNState]:
        projected, gate = self.in_proj(x), self.gate_proj(x)
        with as_it_is(x.device):
            h, past = (None, None) if state is None else state
            (given, _), decay, written, inputs = self.read(projected, past, keep, starts)
            h, last = channel_scan(written * F.silu(given), decay, state=h, starts=starts)
            out = (self.normed(h) * F.silu(gate)).to(gate.dtype)
        return self.o_proj(out), HGRNState(last, inputs)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> HGRNState:
        h = torch.zeros(batch_size, self.width, device=device, dtype=dtype)
        return HGRNState(h, self.empty_inputs(batch_size, device, dtype))
