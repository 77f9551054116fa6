"""ASA-SNN's spatial attention: entries of spiking maps that matter, and the others, get a gate each."""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, divides, flag, number, whole
from regard.shapes import HeadShape


def _inputs(shape: HeadShape) -> tuple[Tensor]:
    """Inputs of 4 steps, of maps of 5 x 3."""
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(2, 4, shape.dim, 5, 3, generator=generator, dtype=torch.float64),)


CARD = Card(
    "spiking_spatial",
    equation="""s = F ((mean + max) / 2 + alpha mean + beta max)      mean and max over pixels; F mixes the T steps
p_tc = 1 where channel c is of the ratio C best of its step and step t of the ratio T best of its channel, else 0
y = g_1 p x + g_2 (1 - p) x
g_1 = sigmoid(K_1 * [mean(p x) / ratio, max(p x)]),   g_2 likewise of 1 - p and 1 - ratio: mean and max over T and C""",
    papers=(
        Paper(
            "Inherent Redundancy in Spiking Neural Networks",
            "Yao, Hu, Zhao, Wang, Zhang, Xu, Li",
            2023,
            "2308.08227",
            "abstract; official code",
        ),
    ),
    protocol="FeatureMixer",
    inputs=_inputs,
    supports={"bidirectional", "compile"},
    cost=Cost("B*C*steps*steps + 36*B*Y*X", ""),
    claim="Gates below 1 make a neuron fire less, and each pixel has two of them, for all steps and channels: "
    "tests/vision/test_spiking_spatial.py::test_a_pixel_has_two_gates_and_neurons_fire_less.",
    differs=(
        "An entry matters where it is in both sets, and sets are each sample's own. The authors' code keeps what is in "
        "exactly one, and joins the sets of a batch: selection='exactly_one', per_sample=False.",
        "alpha, beta and F choose entries alone, so that no gradient reaches them, in the code either: here they are "
        "buffers.",
        "Of equal scores the earlier goes first.",
    ),
    verified="third-party",
    example={"steps": 4},
    tries={"steps": 8, "reduction": 2, "ratio": 0.3},
    defaults={
        "steps": "code, DVS128 Gesture",
        "ratio": "code",
        "reduction": "ours, one matrix; the released scripts have 4 or 8",
        "per_sample": "ours, so that a sample does not depend on its batch",
        "selection": "ours, what the two sets say; the code's is 'exactly_one'",
    },
)


def _largest(s: Float[Tensor, "*b"], count: int, dim: int) -> Bool[Tensor, "*b"]:
    """Which entries are of the `count` largest along an axis; of equals the earlier go first."""
    best = s.argsort(dim=dim, descending=True, stable=True).narrow(dim, 0, count)
    return torch.zeros_like(s, dtype=torch.bool).scatter(dim, best, torch.ones_like(best, dtype=torch.bool))


def spatial_gate(
    group: Float[Tensor, "B T C Y X"], kernel: Float[Tensor, "1 2 3 3"], share: float
) -> Float[Tensor, "B 1 1 Y X"]:
    """One gate a pixel, of mean (over all entries, divided by the share that isn't 0) and maximum."""
    flat = group.flatten(1, 2)
    pair = torch.stack([flat.mean(1) / share, flat.amax(1)], 1)
    return F.conv2d(pair, kernel, padding=1).sigmoid()[:, None]


@CARD.module
class AdvanceSpatialAttention(nn.Module):
    """Scales what goes into neurons, (B, T, C, Y, X), before they sum it up over steps.

    Args:
        steps: T.
        ratio: of channels, and of steps, that are chosen.
        reduction: 1: F is one matrix (T, T); else F = F2 ReLU F1, of T / reduction rows between.
        per_sample: False: the sets of all samples of a batch are joined, as in the code.
        selection: "both": in both sets; "exactly_one": in one of them, as in the code.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        *,
        steps: int = 60,
        ratio: float = 0.5,
        reduction: int = 1,
        per_sample: bool = True,
        selection: Literal["both", "exactly_one"] = "both",
    ) -> None:
        super().__init__()
        whole(self, steps=steps, reduction=reduction)
        divides(self, reduction=reduction, steps=steps)
        number(self, above=0, below=1, ratio=ratio)
        flag(self, per_sample=per_sample)
        choice(self, ("both", "exactly_one"), selection=selection)
        self.steps, self.ratio, self.per_sample, self.selection = steps, ratio, per_sample, selection
        self.register_buffer("alpha", torch.empty(1))
        self.register_buffer("beta", torch.empty(1))
        inner = steps // reduction
        shapes = [(steps, steps)] if reduction == 1 else [(inner, steps), (steps, inner)]
        self.layers = len(shapes)
        for n, shape in enumerate(shapes):
            self.register_buffer(f"mix{n}", torch.empty(shape))
        self.important_kernel = nn.Parameter(torch.empty(1, 2, 3, 3))
        self.rest_kernel = nn.Parameter(torch.empty(1, 2, 3, 3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """alpha and beta 1/2, all else as torch starts linear maps and convolutions."""
        for half in (self.alpha, self.beta):
            nn.init.constant_(half, 0.5)
        for weight in (*self.mixes(), self.important_kernel, self.rest_kernel):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def mixes(self) -> list[Tensor]:
        """F, or F1 and F2."""
        return [self.get_buffer(f"mix{n}") for n in range(self.layers)]

    @torch.no_grad()
    def scores(self, x: Float[Tensor, "B T C Y X"]) -> Float[Tensor, "B T C"]:
        """s: how much each channel matters at each step."""
        mean, top = x.mean((3, 4)), x.amax((3, 4))
        s = ((mean + top) / 2 + self.alpha * mean + self.beta * top).mT
        for n, mix in enumerate(self.mixes()):
            s = F.linear(F.relu(s) if n else s, mix)
        return s.mT

    @checked(T="steps")
    def important(self, x: Float[Tensor, "B T C Y X"]) -> Bool[Tensor, "B T C"]:
        """p."""
        s = self.scores(x.detach())
        channels = _largest(s, int(s.shape[2] * self.ratio), 2)
        steps = _largest(s, int(s.shape[1] * self.ratio), 1)
        if not self.per_sample:
            channels, steps = (chosen.any(0, keepdim=True).expand_as(s) for chosen in (channels, steps))
        return channels & steps if self.selection == "both" else channels ^ steps

    @checked(T="steps")
    def forward(self, x: Float[Tensor, "B T C Y X"]) -> Float[Tensor, "B T C Y X"]:
        if 0 in x.shape[1:]:  # no entry has a mean
            return x.clone()
        p = self.important(x)[..., None, None]
        ours, others = x.masked_fill(~p, 0.0), x.masked_fill(p, 0.0)
        first = spatial_gate(ours, self.important_kernel, self.ratio)
        second = spatial_gate(others, self.rest_kernel, 1 - self.ratio)
        return first * ours + second * others

    def extra_repr(self) -> str:
        return f"steps={self.steps}, ratio={self.ratio}, per_sample={self.per_sample}, selection={self.selection!r}"


class Fired(NamedTuple):
    """What a step gives: spikes, 0 or 1, and the potential that is left."""

    spikes: Tensor
    potential: Tensor


class LeakyIntegrateFire(nn.Module):
    """Neurons that sum up their inputs with a leak, and fire: (B, T, *) -> spikes of that shape, 0 or 1.

    u = v + y;   o = [u >= threshold];   v' = decay (o reset + (1 - o) u) + bias
    The gradient of o is 1 / (2 width) where |u - threshold| < width, else 0.

    Args:
        threshold, decay, reset, bias, width: as above.
    """

    def __init__(
        self,
        threshold: float = 0.3,
        decay: float = 0.3,
        reset: float = 0.0,
        bias: float = 0.0,
        width: float = 0.25,
    ) -> None:
        super().__init__()
        number(self, threshold=threshold, decay=decay, reset=reset, bias=bias)
        number(self, above=0, width=width)
        self.threshold, self.decay, self.reset, self.bias, self.width = threshold, decay, reset, bias, width

    def step(self, y: Float[Tensor, "B ..."], potential: Float[Tensor, "B ..."] | None = None) -> Fired:
        """One step; a potential of None is 0."""
        u = y if potential is None else potential + y
        fixed = u.detach()
        slope = torch.where((fixed - self.threshold).abs() < self.width, u - fixed, 0.0) / (2 * self.width)
        o = (fixed >= self.threshold).to(u.dtype) + slope
        return Fired(o, self.decay * (o * self.reset + (1 - o) * u) + self.bias)

    def forward(self, y: Float[Tensor, "B T ..."]) -> Float[Tensor, "B T ..."]:
        out, potential = [], None
        for now in y.unbind(1):
            spikes, potential = self.step(now, potential)
            out.append(spikes)
        return torch.stack(out, 1) if out else y

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, decay={self.decay}, width={self.width}"
