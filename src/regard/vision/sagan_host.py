"""A small GAN around SAGAN's block, as its authors have it: residual blocks, class-conditional norms, hinge losses.

The paper, and what was read of it, stand on the card of `regard.vision.sagan`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.checks import checked, whole
from regard.vision._shared import MapNorm
from regard.vision.sagan import Form, SAGANAttention
from regard.vision.spectral import SpectralConv2d, SpectralLinear


class ConditionalNorm(nn.Module):
    """A batch norm whose gain and bias are those of the image's class."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.norm = MapNorm(dim, affine=False)
        self.gain, self.bias = nn.Parameter(torch.ones(classes, dim)), nn.Parameter(torch.zeros(classes, dim))

    def forward(self, x: Float[Tensor, "B C Y X"], labels: Int[Tensor, " B"]) -> Float[Tensor, "B C Y X"]:
        gain, bias = (t[labels][..., None, None] for t in (self.gain, self.bias))
        return gain * self.norm(x) + bias


class UpBlock(nn.Module):
    """Of the generator: (B, I, Y, X) -> (B, O, 2 Y, 2 X), with a pointwise convolution beside two of 3 x 3."""

    def __init__(self, inputs: int, outputs: int, classes: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ConditionalNorm(inputs, classes), ConditionalNorm(outputs, classes)
        self.conv1, self.conv2 = SpectralConv2d(inputs, outputs, 3), SpectralConv2d(outputs, outputs, 3)
        self.skip = SpectralConv2d(inputs, outputs, 1)

    def forward(self, x: Float[Tensor, "B I Y X"], labels: Int[Tensor, " B"]) -> Float[Tensor, "B O Y2 X2"]:
        h = F.relu(self.norm1(x, labels))
        h = self.conv1(F.interpolate(h, scale_factor=2.0))
        h = self.conv2(F.relu(self.norm2(h, labels)))
        return cast(Tensor, self.skip(F.interpolate(x, scale_factor=2.0)) + h)


class DownBlock(nn.Module):
    """Of the discriminator: (B, I, Y, X) -> (B, O, Y / 2, X / 2).

    Args:
        inputs, outputs: I and O.
        first: of the image: no ReLU before its first convolution, and what stands beside it is pooled before.
        pool: False keeps the map's size.
    """

    def __init__(self, inputs: int, outputs: int, *, first: bool = False, pool: bool = True) -> None:
        super().__init__()
        self.first, self.pool = first, pool
        self.conv1, self.conv2 = SpectralConv2d(inputs, outputs, 3), SpectralConv2d(outputs, outputs, 3)
        self.skip = SpectralConv2d(inputs, outputs, 1) if pool or inputs != outputs else nn.Identity()

    def forward(self, x: Float[Tensor, "B I Y X"]) -> Float[Tensor, "B O y x"]:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if not self.pool:
            return cast(Tensor, self.skip(x) + h)
        beside = self.skip(F.avg_pool2d(x, 2)) if self.first else F.avg_pool2d(self.skip(x), 2)
        return cast(Tensor, beside + F.avg_pool2d(h, 2))


class SAGANGenerator(nn.Module):
    """Noise and classes to images of 4 * 2^blocks a side, in (-1, 1), with the block at the middle size.

    Args:
        latent: width of the noise.
        classes: how many there are.
        widths: channels at 4 x 4 and behind each block.
        channels: of the images.
        form: of the attention.
    """

    def __init__(
        self,
        latent: int,
        classes: int,
        *,
        widths: Sequence[int] = (128, 64, 32, 16),
        channels: int = 3,
        form: Form = "pooled",
    ) -> None:
        super().__init__()
        whole(self, latent=latent, classes=classes, channels=channels)
        whole(self, 2, widths=len(widths))
        self.latent, self.classes = latent, classes
        self.start = SpectralLinear(latent, 16 * widths[0], bias=True)
        self.blocks = nn.ModuleList(UpBlock(a, b, classes) for a, b in pairwise(widths))
        self.middle = len(widths) // 2
        self.attention = SAGANAttention(widths[self.middle], form=form)
        self.norm, self.out = MapNorm(widths[-1]), SpectralConv2d(widths[-1], channels, 3)

    @checked(Z="latent")
    def forward(self, noise: Float[Tensor, "B Z"], labels: Int[Tensor, " B"]) -> Float[Tensor, "B C Y X"]:
        h = cast(Tensor, self.start(noise)).unflatten(1, (-1, 4, 4))
        for n, block in enumerate(self.blocks, 1):
            h = block(h, labels)
            h = self.attention(h) if n == self.middle else h
        return cast(Tensor, self.out(F.relu(self.norm(h)))).tanh()


class SAGANDiscriminator(nn.Module):
    """Images and classes to a number each, with the block after the second convolutional one, and a last one that
    keeps the size.

    Args:
        classes: how many there are.
        widths: channels behind each block; of at least two.
        channels: of the images.
        form: of the attention.
    """

    def __init__(
        self, classes: int, *, widths: Sequence[int] = (16, 32, 64), channels: int = 3, form: Form = "pooled"
    ) -> None:
        super().__init__()
        whole(self, classes=classes, channels=channels)
        whole(self, 2, widths=len(widths))
        self.dim, self.classes = channels, classes
        down = [DownBlock(a, b, first=n == 0) for n, (a, b) in enumerate(pairwise((channels, *widths)))]
        self.blocks = nn.ModuleList([*down, DownBlock(widths[-1], widths[-1], pool=False)])
        self.attention = SAGANAttention(widths[1], form=form)
        self.out = SpectralLinear(widths[-1], 1, bias=True)
        self.of_class = SpectralLinear(widths[-1], classes)

    @checked(C="dim")
    def forward(self, images: Float[Tensor, "B C Y X"], labels: Int[Tensor, " B"]) -> Float[Tensor, "B 1"]:
        h = images
        for n, block in enumerate(self.blocks):
            h = block(h)
            h = self.attention(h) if n == 1 else h
        h = F.relu(h).sum((2, 3))
        return cast(Tensor, self.out(h) + self.of_class(h).gather(1, labels[:, None]))


def discriminator_loss(real: Float[Tensor, "*n"], fake: Float[Tensor, "*m"]) -> Float[Tensor, ""]:
    """The discriminator's hinge: mean relu(1 - D(real)) + mean relu(1 + D(fake))."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def generator_loss(fake: Float[Tensor, "*m"]) -> Float[Tensor, ""]:
    """And the generator's: -mean D(fake)."""
    return -fake.mean()
