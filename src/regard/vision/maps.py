"""What mixers of feature maps share."""

from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call

from regard.tracing import recomputing

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
    B, H, Y, X, _ = z.shape
    tall, wide = window
    parts = z.reshape(B, H, Y // tall, tall, X // wide, wide, -1).permute(0, 2, 4, 1, 3, 5, 6)
    return parts.reshape(B * (Y // tall) * (X // wide), H, tall * wide, -1)


def batch_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, z: Float[Tensor, "B C *sizes"]) -> Float[Tensor, "B C *sizes"]:
    """The norm; a checkpoint's second run, before which the first has moved the running statistics, moves copies."""
    copies = {name: b.clone() for name, b in norm.named_buffers()} if recomputing() else {}
    out: Tensor = functional_call(norm, copies, (z,)) if copies else norm(z)
    return out
