"""What mixers of feature maps share."""

import torch
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
    B, H, Y, X, D = z.shape
    tall, wide = window
    parts = z.reshape(B, H, Y // tall, tall, X // wide, wide, D).permute(0, 2, 4, 1, 3, 5, 6)
    return parts.reshape(B * (Y // tall) * (X // wide), H, tall * wide, D)


def differences(table: Float[Tensor, "H rows columns"], tall: int, wide: int) -> Float[Tensor, "H pixels pixels"]:
    """The entries of a table of differences of place, 0 in its middle, for each pair of a window's pixels."""
    dy, dx = (
        at[:, None] - at + (size - 1) // 2
        for at, size in zip((torch.arange(n, device=table.device) for n in (tall, wide)), table.shape[1:], strict=True)
    )
    return table[:, dy[:, None, :, None], dx[:, None]].flatten(3).flatten(1, 2)
