"""Quantised spike-driven attention: queries, keys and values are few spikes, weights have few bits.

No softmax is taken. While it trains, a neuron gives a whole number n of 0 .. L as n / L; when it runs, that is n spikes
in L steps. A linear map of the sum is the sum of the map over steps, so that products with spikes are additions.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, divides, number, refuse, whole
from regard.kernels.check import check_inputs
from regard.vision.maps import to_map

ROUNDED = "neurons and weights are rounded, and their gradients are made up: they are no slopes of the output"

CARD = Card(
    "quantized_spike",
    equation="""s(x) = floor(clamp(L x, 0, L) + 1/2) / L,   ds/dx = 1 for 0 < x < 1, else 0
q, k, v = s(BN(Rep(s(x)))),   o = scale q (k^T v),   y = BN(Rep_o(2 s(o)))
Rep(x) = BN(W2 * depthwise 3x3(border(BN(W1 * x)))),   border: one pixel of what the norm makes of 0
every W: a_c round(clamp(W / a_c, -2^(b-1), 2^(b-1) - 1)), a step a_c > 0 for each output channel""",
    papers=(
        Paper(
            "Quantized Spike-driven Transformer",
            "Qiu et al.",
            2025,
            "2501.13492",
            "abstract; official code (classification); not the paper's body",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    traits={"straight_through"},
    cost=Cost("2*B*Y*X*M*D", ""),
    claim="Its spikes can be sent one by one: the output is the same when every neuron's is replaced by binary trains "
    "that are summed behind the linear maps: "
    "tests/vision/test_quantized_spike.py::test_spikes_may_come_one_by_one.",
    differs=(
        "Steps are set from the weights when these are, where the code does it at the first pass in training.",
        "The neuron has no leak, threshold or reset, as the code's, whose training has one time step; what of the "
        "paper's entropy is in it was not to be read.",
        "The neuron behind the products has twice the gain, as in the code.",
        "The distillation is not in the published code: `attention_distillation` is reconstructed from the abstract, "
        "the mean squared difference of each layer's maps.",
        "Layer scales, MLP, convolution blocks and stages of the whole model are left to the caller.",
    ),
    verified="third-party",
    tasks=("digits",),
    tries={"scale": 0.5, "levels": 2, "bits": 3},
    exceptions={
        "L10 batch_rows_do_not_meet_in_training": "batch norms take all maps of a batch together in training",
        "L23": ROUNDED,
        "L24": ROUNDED,
        "L51": ROUNDED,
        "L52": "what stands beyond a map's border follows running statistics, which each pass in training moves",
    },
    defaults={"bits": "code", "levels": "code", "scale": "code"},
)


def integer_spike(x: Float[Tensor, " *b"], levels: int = 4, gain: float = 1.0) -> Float[Tensor, " *b"]:
    """gain / L times the number of spikes, halves rounded up; the gradient is `gain` strictly between 0 and 1."""
    fixed = x.detach()
    passed = torch.where((fixed > 0) & (fixed < 1), x - fixed, 0.0)  # 0, whose gradient is 1
    return gain / levels * ((levels * fixed).clamp(0, levels) + 0.5).floor() + gain * passed


def to_spikes(x: Float[Tensor, " *b"], levels: int = 4) -> Float[Tensor, "levels ..."]:
    """Trains of 0 and 1, the spikes first: gain / L times their sum is `integer_spike(x, L, gain)`."""
    count = ((levels * x.detach()).clamp(0, levels) + 0.5).floor()
    steps = torch.arange(levels, device=x.device).view(-1, *[1] * x.dim())
    return (count > steps).to(x.dtype)


def lsq(weight: Float[Tensor, "O ..."], step: Float[Tensor, " O"], bits: int = 4) -> Float[Tensor, "O ..."]:
    """Weights as whole numbers of steps, one step for each output channel (learned step size quantisation).

    Roundings pass gradients straight on; beyond the range a weight has none. A step's is divided by
    sqrt(weights * greatest number).
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    slowed = step.detach() + (step - step.detach()) / math.sqrt(weight.numel() * high)
    a = slowed.view(-1, *[1] * (weight.dim() - 1))
    whole_steps = (weight / a).clamp(low, high)
    return a * (whole_steps.detach().round() + (whole_steps - whole_steps.detach()))


def lsq_step(weight: Float[Tensor, "O ..."], bits: int = 4) -> Float[Tensor, " O"]:
    """Where steps start: 2 mean |W| / sqrt(greatest number), the same for all channels."""
    return (2 * weight.detach().abs().mean() / math.sqrt(2 ** (bits - 1) - 1)).expand(len(weight)).clone()


@checked()
def spike_attention(
    q: Float[Tensor, "B H N D"], k: Float[Tensor, "B H S D"], v: Float[Tensor, "B H S V"], *, scale: float = 0.25
) -> Float[Tensor, "B H N V"]:
    """scale q (k^T v): no softmax, and a scale that knows neither width nor number."""
    check_inputs(q, k, v)
    return scale * (q @ (k.mT @ v))


def attention_distillation(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Float[Tensor, ""]:
    """How far a student's maps (or outputs of attention) are from a teacher's: mean squares, the mean over layers.

    No gradient reaches the teacher.
    """
    name = "attention_distillation"
    if not student or len(student) != len(teacher):
        refuse(name, "teacher", "has another number of layers than the student", len(teacher), f"{len(student)}, > 0")
    for ours, theirs in zip(student, teacher, strict=True):
        if ours.shape != theirs.shape:
            refuse(name, "teacher", "has a layer of another shape", tuple(theirs.shape), f"{tuple(ours.shape)}")
    parts = [(ours - theirs.detach()).square().mean() for ours, theirs in zip(student, teacher, strict=True)]
    return torch.stack(parts).mean()


class IntegerSpike(nn.Module):
    """`integer_spike` with its levels L and gain."""

    def __init__(self, levels: int = 4, gain: float = 1.0) -> None:
        super().__init__()
        whole(self, levels=levels)
        number(self, above=0, gain=gain)
        self.levels, self.gain = levels, gain

    def forward(self, x: Float[Tensor, " *b"]) -> Float[Tensor, " *b"]:
        return integer_spike(x, self.levels, self.gain)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, gain={self.gain}"


class LSQConv2d(nn.Conv2d):
    """A convolution without bias or padding, whose weights are `lsq`."""

    def __init__(self, inputs: int, outputs: int, size: int, *, groups: int = 1, bits: int = 4) -> None:
        whole(type(self).__name__, 2, most=16, bits=bits)
        self.bits = bits
        super().__init__(inputs, outputs, size, groups=groups, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.step = nn.Parameter(lsq_step(self.weight, self.bits))

    def forward(self, x: Float[Tensor, "B I Y X"]) -> Float[Tensor, "B O y x"]:
        return F.conv2d(x, lsq(self.weight, self.step, self.bits), groups=self.groups)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


class RepConv(nn.Module):
    """Three quantised convolutions and three norms; C -> C on a map of the same size."""

    def __init__(self, dim: int, *, bits: int = 4) -> None:
        super().__init__()
        self.point, self.mix = (LSQConv2d(dim, dim, 1, bits=bits) for _ in range(2))
        self.depth = LSQConv2d(dim, dim, 3, groups=dim, bits=bits)
        self.norm, self.inner_norm, self.outer_norm = (nn.BatchNorm2d(dim) for _ in range(3))

    def border(self) -> Float[Tensor, " C"]:
        """What the first norm makes of 0, with its running statistics."""
        norm = self.norm
        assert norm.running_var is not None
        assert norm.running_mean is not None
        return norm.bias.detach() - norm.running_mean * norm.weight.detach() / (norm.running_var + norm.eps).sqrt()

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        z = F.pad(self.norm(self.point(x)), (1, 1, 1, 1))
        frame = F.pad(z.new_zeros(1, 1, *x.shape[2:]), (1, 1, 1, 1), value=1.0)
        z = z + frame * self.border()[:, None, None].to(z.dtype)
        return self.outer_norm(self.inner_norm(self.mix(self.depth(z))))


@CARD.module
class QuantizedSpikeAttention(nn.Module):
    """Attention of spikes among the pixels of a map.

    Args:
        dim, num_heads: C and H.
        bits: of every weight, from 2 to 16.
        levels: L, most spikes of a neuron.
        scale: of the products.
    """

    def __init__(self, dim: int, num_heads: int, *, bits: int = 4, levels: int = 4, scale: float = 0.25) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads)
        divides(self, num_heads=num_heads, dim=dim)
        whole(self, 2, most=16, bits=bits)
        whole(self, levels=levels)
        number(self, above=0, scale=scale)
        self.dim, self.num_heads, self.scale = dim, num_heads, scale
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (RepConv(dim, bits=bits) for _ in range(4))
        self.spike, self.out_spike = IntegerSpike(levels), IntegerSpike(levels, 2.0)

    def heads(self, x: Float[Tensor, "B C Y X"]) -> tuple[Tensor, Tensor, Tensor]:
        """The spikes of queries, keys and values, (B, H, N, D) each."""
        x = self.spike(x)
        drawn = (self.spike(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (z.flatten(2).unflatten(1, (self.num_heads, -1)).mT for z in drawn)
        return q, k, v

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        out = spike_attention(*self.heads(x), scale=self.scale).transpose(1, 2).flatten(2)
        return self.o_proj(self.out_spike(to_map(out, x.shape[2:])))

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, scale={self.scale}"
