"""What mixers of feature maps share."""

from jaxtyping import Float, Shaped
from torch import Tensor

AXES = {1: "X", 2: "Y X", 3: "Z Y X"}
"""The letters of lines, images and volumes, for `regard.checks.fits`."""


def to_tokens(x: Float[Tensor, "B C *sizes"]) -> Float[Tensor, "B N C"]:
    """Places in row-major order as tokens."""
    return x.flatten(2).mT


def to_map(tokens: Float[Tensor, "B N C"], sizes: tuple[int, ...]) -> Float[Tensor, "B C *sizes"]:
    """The reverse."""
    return tokens.mT.unflatten(2, sizes)


def in_windows(z: Shaped[Tensor, "B H Y X d"], window: tuple[int, int]) -> Shaped[Tensor, "windows H pixels d"]:
    """The windows that divide Y and X row by row, those of the first map first."""
    B, H, Y, X, d = z.shape
    tall, wide = window
    parts = z.reshape(B, H, Y // tall, tall, X // wide, wide, d).permute(0, 2, 4, 1, 3, 5, 6)
    return parts.reshape(B * (Y // tall) * (X // wide), H, tall * wide, d)
