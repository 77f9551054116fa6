"""Class semantics-based attention: a recogniser's features weigh a detector's channels and steps."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, refuse, whole
from regard.shapes import HeadShape


def _inputs(shape: HeadShape) -> tuple[Tensor, Tensor]:
    """Sequences of 8 steps: a detector's features, and as wide ones of a recogniser."""
    generator = torch.Generator().manual_seed(2)
    x, r = (torch.randn(2, shape.dim, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, r


CARD = Card(
    "class_semantics",
    equation="""a = sigmoid(W2 ReLU(W1 mean_t(R)))              one weight a channel, from the recogniser's features R
b_t = sigmoid(w2 . ReLU(conv_k(R))_t)           one a step; length: from W2' ReLU(W1' mean_c(R))
y = x a + x b      both in parallel, then fused: their sum, mean, or a pointwise map of both""",
    papers=(
        Paper(
            "Class Semantics-based Attention for Action Detection",
            "Sridhar, Quader, Muralidharan, Li, Dai, Lu",
            2021,
            "2109.02613",
            "abstract; a summary of the method with the caption of figure 1",
        ),
    ),
    protocol="FeatureMixer",
    inputs=_inputs,
    supports={"bidirectional", "compile"},
    cost=Cost("B*T*(M//reduction)*(M*kernel_size + 1) + 2*B*M*(M//reduction)", ""),
    claim="Weights from what tells classes apart find the channels that hold the action, where the same weights from "
    "the detector's own features, as squeeze and excitation has them, do not: "
    "tests/vision/test_class_semantics.py::test_the_recogniser_tells_which_channels_count.",
    differs=(
        "The method section and code were not to be had: that weights come from R, one a channel and one a step, "
        "independent and in parallel, is known; their depth and width, the convolution over time and the sum are "
        "inferred.",
        "Padded steps count neither in means nor in convolutions, and give 0.",
    ),
    verified="reconstructed",
    tries={"axis": "time", "length": 8, "semantics_dim": 10},
    defaults={
        "semantics_dim": "ours, as wide as dim",
        "axis": "paper, abstract",
        "reduction": "ours, between squeeze and excitation's and none",
        "kernel_size": "ours",
        "length": "ours, sequences of any length",
        "fuse": "ours, two halves of x at the start",
    },
)


class ChannelSemantics(nn.Module):
    """a: one weight for each channel, from the mean over steps of a sequence (B, Cr, T) -> (B, C).

    From the features that it gates this is squeeze and excitation. Its last layer starts at 0, gates at 1/2.

    Args:
        inputs, outputs: Cr and C.
        reduction: C over the width between.
    """

    def __init__(self, inputs: int, outputs: int, *, reduction: int = 4) -> None:
        super().__init__()
        whole(self, inputs=inputs, outputs=outputs, reduction=reduction)
        self.inputs = inputs
        inner = max(1, outputs // reduction)
        self.squeeze, self.excite = nn.Linear(inputs, inner), nn.Linear(inner, outputs)
        _neutral(self.excite)

    @checked(Cr="inputs")
    def forward(self, r: Float[Tensor, "B Cr T"], mask: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, "B C"]:
        if mask is None:
            mean = r.sum(2) / max(1, r.shape[2])
        else:
            mean = r.masked_fill(~mask[:, None], 0.0).sum(2) / mask.sum(1, keepdim=True).clamp(min=1)
        found: Tensor = self.excite(F.relu(self.squeeze(mean)))
        return found.sigmoid()


class StepSemantics(nn.Module):
    """b: one weight for each step of a sequence, (B, Cr, T) -> (B, T), 0 at padded ones. Starts at 1/2.

    Args:
        inputs: Cr.
        inner: width between.
        kernel_size: of the convolution.
        length: T, where the gate is squeeze and excitation with its axes exchanged, of `steps` between.
        steps: see there.
    """

    def __init__(
        self, inputs: int, inner: int, *, kernel_size: int = 3, length: int | None = None, steps: int = 1
    ) -> None:
        super().__init__()
        whole(self, inputs=inputs, inner=inner, kernel_size=kernel_size, steps=steps)
        if kernel_size % 2 == 0:
            refuse(self, "kernel_size", "is even", kernel_size, "an odd number of steps")
        self.inputs, self.length = inputs, length
        self.squeeze: nn.Module
        self.excite: nn.Linear | nn.Conv1d
        if length is None:
            self.squeeze = nn.Conv1d(inputs, inner, kernel_size, padding=kernel_size // 2)
            self.excite = nn.Conv1d(inner, 1, 1)
        else:
            whole(self, length=length)
            self.squeeze, self.excite = nn.Linear(length, steps), nn.Linear(steps, length)
        _neutral(self.excite)

    @checked(Cr="inputs")
    def forward(self, r: Float[Tensor, "B Cr T"], mask: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, "B T"]:
        if self.length is not None and r.shape[2] != self.length:
            refuse(self, "r", "is of another length", r.shape[2], f"length = {self.length}")
        if r.shape[2] == 0:
            return r.new_zeros(len(r), 0)
        r = r if mask is None else r.masked_fill(~mask[:, None], 0.0)
        z = self.excite(F.relu(self.squeeze(r if self.length is None else r.mean(1))))
        b = (z[:, 0] if self.length is None else z).sigmoid()
        return b if mask is None else b.masked_fill(~mask, 0.0)


@CARD.module
class ClassSemanticsGate(nn.Module):
    """Features (B, C, T) of a detector gated by those of a recogniser, (B, Cr, T).

    Args:
        dim: C.
        semantics_dim: Cr; default dim.
        axis: which weights there are; with one alone nothing is fused.
        reduction: C (with `length` T) over the width between.
        kernel_size: of the convolution over time.
        length: T, for weights of steps that all steps decide, by a matrix; None is the convolution.
        fuse: of the two products; "concat" is a pointwise map of both, that of channels first.
    """

    def __init__(
        self,
        dim: int,
        *,
        semantics_dim: int | None = None,
        axis: Literal["both", "channel", "time"] = "both",
        reduction: int = 4,
        kernel_size: int = 3,
        length: int | None = None,
        fuse: Literal["sum", "mean", "concat"] = "sum",
    ) -> None:
        super().__init__()
        semantics_dim = dim if semantics_dim is None else semantics_dim
        whole(self, dim=dim, semantics_dim=semantics_dim, reduction=reduction)
        choice(self, ("both", "channel", "time"), axis=axis)
        choice(self, ("sum", "mean", "concat"), fuse=fuse)
        self.dim, self.semantics_dim, self.axis, self.fuse = dim, semantics_dim, axis, fuse
        inner, steps = max(1, dim // reduction), 1 if length is None else max(1, length // reduction)
        self.channel = None if axis == "time" else ChannelSemantics(semantics_dim, dim, reduction=reduction)
        self.time = (
            None
            if axis == "channel"
            else StepSemantics(semantics_dim, inner, kernel_size=kernel_size, length=length, steps=steps)
        )
        self.mix = nn.Conv1d(2 * dim, dim, 1) if axis == "both" and fuse == "concat" else None

    @checked(C="dim", Cr="semantics_dim")
    def forward(
        self, x: Float[Tensor, "B C T"], semantics: Float[Tensor, "B Cr T"], mask: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B C T"]:
        """`mask` is True at real steps."""
        x = x if mask is None else x.masked_fill(~mask[:, None], 0.0)
        parts = []
        if self.channel is not None:
            parts.append(x * self.channel(semantics, mask)[..., None])
        if self.time is not None:
            parts.append(x * self.time(semantics, mask)[:, None])
        if self.mix is not None:
            out = self.mix(torch.cat(parts, 1)) if x.shape[2] else x
            return out if mask is None else out.masked_fill(~mask[:, None], 0.0)
        return torch.stack(parts).sum(0) / (len(parts) if self.fuse == "mean" else 1)

    def extra_repr(self) -> str:
        return f"{self.dim}, semantics_dim={self.semantics_dim}, axis={self.axis!r}, fuse={self.fuse!r}"


class SemanticsDetector(nn.Module):
    """A small detector of actions: R (B, Cr, T) -> features -> logits of start, end and action, (B, 3, T).

    Args:
        semantics_dim, dim: Cr and C.
        gate: what stands between features and heads, called with both; None: nothing.
    """

    def __init__(self, semantics_dim: int, dim: int, gate: ClassSemanticsGate | None) -> None:
        super().__init__()
        layers = [nn.Conv1d(n, dim, 3, padding=1) for n in (semantics_dim, dim)]
        self.encoder = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU())
        self.gate = gate
        self.heads = nn.Sequential(nn.Conv1d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv1d(dim, 3, 1))

    def forward(self, r: Float[Tensor, "B Cr T"]) -> Float[Tensor, "B 3 T"]:
        f = self.encoder(r)
        out: Tensor = self.heads(f if self.gate is None else self.gate(f, r))
        return out


def _neutral(layer: nn.Linear | nn.Conv1d) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
