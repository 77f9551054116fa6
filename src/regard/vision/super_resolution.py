"""A host for super-resolution: from a small image to one that is s times as large, through any mixers of maps.

    f = conv(image),   f = f + conv(body(f)),   out = upsampler(f) [+ the image, resized]

The body is any module from maps to maps, such as `ResidualGroup`s of blocks. What networks of these blocks share stands
here; each is put together beside its block.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.checks import checked, choice, number, refuse, whole

RGB_MEAN = (0.4488, 0.4371, 0.4040)
"""Of the pictures of DIV2K, on which these networks are trained."""

Base = Literal["none", "bilinear"]


class MapNorm(nn.LayerNorm):
    """Normalises the channels of each pixel."""

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ResidualGroup(nn.Module):
    """x + conv(blocks(x))."""

    def __init__(self, dim: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.conv = nn.Sequential(*blocks), nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        return x + self.conv(self.blocks(x))


class DropPath(nn.Module):
    """Leaves out a branch for some samples in training, and scales it for the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        number(self, least=0, below=1, rate=rate)
        self.rate = rate

    def forward(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return torch.where(kept, x / (1 - self.rate), 0.0)


class PixelShuffle(nn.Module):
    """Channels become pixels of the larger image.

    Args:
        dim, channels: of the map and of the image.
        scale: s.
        hidden: None makes the image by one convolution; else a convolution with this many channels comes first, then
            one for each factor of the scale, 2 and 2 for 4, and one last.
    """

    def __init__(self, dim: int, *, channels: int = 3, scale: int = 4, hidden: int | None = None) -> None:
        super().__init__()
        whole(self, dim=dim, channels=channels, scale=scale)
        self.scale = scale
        if hidden is None:
            self.steps = nn.Sequential(nn.Conv2d(dim, channels * scale**2, 3, padding=1), nn.PixelShuffle(scale))
            return
        whole(self, hidden=hidden)
        layers: list[nn.Module] = [nn.Conv2d(dim, hidden, 3, padding=1), nn.LeakyReLU(0.01)]
        for s in factors(scale):
            layers += [nn.Conv2d(hidden, hidden * s**2, 3, padding=1), nn.PixelShuffle(s)]
        self.steps = nn.Sequential(*layers, nn.Conv2d(hidden, channels, 3, padding=1))

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B channels tall wide"]:
        return self.steps(x)


def factors(scale: int) -> tuple[int, ...]:
    """The steps of an enlargement: as often by 2 as this divides it, and the rest at once."""
    return (2, *factors(scale // 2)) if scale > 2 and scale % 2 == 0 else (scale,) * (scale > 1)


class SuperResolution(nn.Module):
    """The host.

    Args:
        body: from maps (B, dim, Y, X) to the same.
        upsampler: from such maps to images (B, channels, s Y, s X).
        dim: channels of the maps.
        channels: of the images.
        scale: s.
        base: what the upsampler's output is added to: nothing, or the image, resized.
        mean: of each channel, taken from the image at first and given back at last.
        span: what images are multiplied by in between.
        multiple: images are padded by reflection, on the right and below, to sides that this divides.
        first_bias: whether the first convolution has a bias.

    Shapes: image (B, channels, Y, X) -> (B, channels, s Y, s X).
    """

    def __init__(
        self,
        body: nn.Module,
        upsampler: nn.Module,
        *,
        dim: int,
        channels: int = 3,
        scale: int = 4,
        base: Base = "none",
        mean: Sequence[float] | None = None,
        span: float = 1.0,
        multiple: int = 1,
        first_bias: bool = True,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, channels=channels, scale=scale, multiple=multiple)
        number(self, above=0, span=span)
        choice(self, get_args(Base), base=base)
        if mean is not None and len(mean) != channels:
            refuse(self, "mean", "has another number of channels", tuple(mean), f"{channels} numbers")
        self.channels, self.scale, self.base, self.span, self.multiple = channels, scale, base, span, multiple
        self.mean = None if mean is None else tuple(mean)
        self.first = nn.Conv2d(channels, dim, 3, padding=1, bias=first_bias)
        self.body, self.upsampler = body, upsampler
        self.trunk = nn.Conv2d(dim, dim, 3, padding=1)

    @checked(C="channels")
    def forward(self, image: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C tall wide"]:
        """Enlarge the images.

        Raises:
            ValueError: an image without pixels, or too small for the reflection that it needs.
        """
        Y, X = image.shape[2:]
        below, right = (-n % self.multiple for n in (Y, X))
        if below >= Y or right >= X:
            expected = f"sides that are more than half of {self.multiple}, to be reflected, and at least 1"
            refuse(self, "image", "is too small", tuple(image.shape), expected)
        x = F.pad(image, (0, right, 0, below), mode="reflect") if below or right else image
        mean = 0.0 if self.mean is None else x.new_tensor(self.mean)[:, None, None]
        f = self.first((x - mean) * self.span)
        out = self.upsampler(f + self.trunk(self.body(f)))
        if self.base == "bilinear":
            out = out + F.interpolate((x - mean) * self.span, scale_factor=self.scale, mode="bilinear")
        return (out / self.span + mean)[:, :, : Y * self.scale, : X * self.scale]
