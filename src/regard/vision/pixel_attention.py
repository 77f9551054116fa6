"""Pixel attention: each entry of a map has a gate of its own, made of all channels of its pixel.

Two more parts of the network PAN are made with it: a block with two branches, one of which is gated (`scpa`), and a
stage that enlarges maps (`UpsamplingPixelAttention`).
"""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, divides, number, whole
from regard.vision.super_resolution import SuperResolution, factors

PAPERS = (
    Paper(
        "Efficient Image Super-Resolution Using Pixel Attention",
        "Zhao, Kong, He, Qiao, Dong",
        2020,
        "2010.01073",
        "abstract; official code (PAN_arch.py)",
    ),
)

KINKS = (
    "a step along all inputs and parameters at once takes some of thousands of LeakyReLUs past its kink; along each by "
    "itself gradients are slopes"
)

CARD = Card(
    "pixel_attention",
    equation="y = x * sigmoid(W x + b)      W 1 x 1, C to C: a gate for each channel of each pixel, from that pixel",
    papers=PAPERS,
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("B*Y*X*M**2", ""),
    claim="A gate of its own for every entry, by C^2 + C parameters at any size of map: "
    "tests/vision/test_pixel_attention.py::test_a_pixel_answers_to_itself_alone, "
    "tests/vision/test_pixel_attention.py::test_without_weights_it_halves.",
    verified="third-party",
)

BLOCK = Card(
    "scpa",
    equation="""a = l(K1 l(Pa x))      u = l(Pb x)      l = LeakyReLU      Pa, Pb 1 x 1, C to C / reduction, no bias
z = l(K4 ((K3 u) * sigmoid(K2 u + b)))      K1, K3, K4 3 x 3, no bias, K1 dilated;   K2 1 x 1
y = x + P [a; z]      P 1 x 1, no bias""",
    papers=PAPERS,
    gist="SC-PA, PAN's block: half of the channels is convolved, the other half also gated pixel by pixel.",
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("B*Y*X*(4*M*(M/reduction) + 28*(M/reduction)**2)", ""),
    claim="A network of 16 such blocks has 272 K parameters; each sees no further than its convolutions: "
    "tests/vision/test_pixel_attention.py::test_the_block_sees_a_few_pixels_around.",
    differs=(
        "P reads twice C / reduction channels for every reduction, as two branches give; the code's P fits them at a "
        "reduction of 2 alone.",
    ),
    verified="third-party",
    exceptions={"L51 gradients_are_slopes": KINKS},
    defaults={"reduction": "code", "dilation": "code", "slope": "code"},
)


def pixel_gate(
    x: Float[Tensor, "B C Y X"], weight: Float[Tensor, "O C 1 1"], bias: Float[Tensor, " O"] | None
) -> Float[Tensor, "B O Y X"]:
    """sigmoid(W x + b), in (0, 1)."""
    return F.conv2d(x, weight, bias).sigmoid()


@CARD.module
class PixelAttention(nn.Module):
    """x times its gate.

    Args:
        dim: C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        whole(self, dim=dim)
        self.dim, self.gate_proj = dim, nn.Conv2d(dim, dim, 1)

    @checked(C="dim")
    def gate(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        """How much of each entry passes, in (0, 1)."""
        return pixel_gate(x, self.gate_proj.weight, self.gate_proj.bias)

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        return x * self.gate(x)


class PixelAttentionConv(nn.Module):
    """K4 ((K3 u) * gate), the gate made of u: between two convolutions, unlike `PixelAttention`'s.

    Args:
        dim: channels of u.
        slope: None makes the gate of u itself; a number has a 3 x 3 convolution and a LeakyReLU of this slope first.
    """

    def __init__(self, dim: int, *, slope: float | None = None) -> None:
        super().__init__()
        self.slope = slope
        self.before = None if slope is None else nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.gate_proj = nn.Conv2d(dim, dim, 1)
        self.inner, self.outer = (nn.Conv2d(dim, dim, 3, padding=1, bias=False) for _ in range(2))

    def gate(self, u: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        """How much of each entry of K3 u passes."""
        told = u if self.before is None else F.leaky_relu(self.before(u), cast(float, self.slope))
        return pixel_gate(told, self.gate_proj.weight, self.gate_proj.bias)

    def forward(self, u: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        return self.outer(self.inner(u) * self.gate(u))


@BLOCK.module
class SelfCalibratedPixelAttention(nn.Module):
    """The block, residual inside.

    Args:
        dim: C.
        reduction: of the channels of each branch.
        dilation: of the convolution of the branch that is not gated.
        slope: of the LeakyReLUs.
    """

    def __init__(self, dim: int, *, reduction: int = 2, dilation: int = 1, slope: float = 0.2) -> None:
        super().__init__()
        whole(self, dim=dim, reduction=reduction, dilation=dilation)
        divides(self, reduction=reduction, dim=dim)
        number(self, least=0, slope=slope)
        inner = dim // reduction
        self.dim, self.reduction, self.dilation, self.slope = dim, reduction, dilation, slope
        self.plain_in, self.gated_in = (nn.Conv2d(dim, inner, 1, bias=False) for _ in range(2))
        self.plain = nn.Conv2d(inner, inner, 3, padding=dilation, dilation=dilation, bias=False)
        self.gated = PixelAttentionConv(inner)
        self.join = nn.Conv2d(2 * inner, dim, 1, bias=False)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        def bent(z: Tensor) -> Tensor:
            return F.leaky_relu(z, self.slope)

        plain = bent(self.plain(bent(self.plain_in(x))))
        gated = bent(self.gated(bent(self.gated_in(x))))
        return x + self.join(torch.cat([plain, gated], 1))

    def extra_repr(self) -> str:
        return f"{self.dim}, reduction={self.reduction}, dilation={self.dilation}"


class UpsamplingPixelAttention(nn.Module):
    """Repeats pixels, convolves and gates them, and convolves again; twice by 2 where s is 4.

    Args:
        dim, out: channels before and after.
        scale: s: 2, 3 or 4.
        slope: of the LeakyReLUs.

    Shapes: x (B, dim, Y, X) -> (B, out, s Y, s X).
    """

    def __init__(self, dim: int, out: int, scale: int, *, slope: float = 0.2) -> None:
        super().__init__()
        whole(self, dim=dim, out=out)
        choice(self, (2, 3, 4), scale=scale)
        number(self, least=0, slope=slope)
        self.dim, self.slope, self.factors = dim, slope, factors(scale)
        widths = (dim, *[out] * (len(self.factors) - 1))
        self.up = nn.ModuleList(nn.Conv2d(n, out, 3, padding=1) for n in widths)
        self.attention = nn.ModuleList(PixelAttention(out) for _ in widths)
        self.after = nn.ModuleList(nn.Conv2d(out, out, 3, padding=1) for _ in widths)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B out tall wide"]:
        for s, up, attention, after in zip(self.factors, self.up, self.attention, self.after, strict=True):
            x = attention(up(F.interpolate(x, scale_factor=s, mode="nearest")))
            x = F.leaky_relu(after(F.leaky_relu(x, self.slope)), self.slope)
        return x


def pixel_attention_network(
    blocks: list[nn.Module], *, dim: int, up_dim: int, scale: int, channels: int
) -> SuperResolution:
    """The host of PAN and A2N around their blocks."""
    upsampler = nn.Sequential(UpsamplingPixelAttention(dim, up_dim, scale), nn.Conv2d(up_dim, channels, 3, padding=1))
    return SuperResolution(nn.Sequential(*blocks), upsampler, dim=dim, channels=channels, scale=scale, base="bilinear")


def pan(*, dim: int = 40, up_dim: int = 24, blocks: int = 16, scale: int = 4, channels: int = 3) -> SuperResolution:
    """PAN, in the sizes of its authors.

    Args:
        dim, up_dim: channels of the maps before and after they are enlarged.
        blocks: how many.
        scale: 2, 3 or 4.
        channels: of the images.
    """
    made: list[nn.Module] = [SelfCalibratedPixelAttention(dim) for _ in range(blocks)]
    return pixel_attention_network(made, dim=dim, up_dim=up_dim, scale=scale, channels=channels)
