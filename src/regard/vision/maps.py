"""What mixers of feature maps share."""

from jaxtyping import Float
from torch import Tensor

AXES = {1: "X", 2: "Y X", 3: "Z Y X"}
"""The letters of lines, images and volumes, for `regard.checks.fits`."""


def to_tokens(x: Float[Tensor, "B C *sizes"]) -> Float[Tensor, "B N C"]:
    """Places in row-major order as tokens."""
    return x.flatten(2).mT


def to_map(tokens: Float[Tensor, "B N C"], sizes: tuple[int, ...]) -> Float[Tensor, "B C *sizes"]:
    """The reverse."""
    return tokens.mT.unflatten(2, sizes)
