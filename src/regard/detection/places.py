"""Where things stand in an image: embeddings of places, centres of pixels, and what a mechanism asks to be told."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Reads = Literal["reference", "point", "shapes", "place"]
"""What a mechanism may be called with after x and context. A class lists it in its attribute `reads`, in that order.

reference   where each query looks on each level, points (x, y) or boxes (cx, cy, w, h) in [0, 1]: (B, T, #L, 2 or 4)
point       where each query looks, as one point: (B, T, 2)
shapes      (Y, X) of every level that context is made of
place       embedding of the places of context: (B, S, M)

Places are added to x and context for who reads nothing, to neither for who reads `place`, and to x alone otherwise.
"""


def sine_embedding(
    points: Float[Tensor, "*b 2"], dim: int, *, temperature: float = 10000.0
) -> Float[Tensor, "*b {dim}"]:
    """(x, y) in [0, 1] as dim / 2 sines and cosines of y, then as many of x, in at least fp32."""
    n = dim // 2
    wide = torch.promote_types(points.dtype, torch.float32)
    j = torch.arange(n, device=points.device)
    angle = 2 * math.pi * points.flip(-1)[..., None].to(wide) / temperature ** ((2 * (j // 2)).to(wide) / n)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).flatten(-2)


def pixel_centres(shapes: Sequence[tuple[int, int]], **at: Any) -> Float[Tensor, "S 2"]:
    """(x, y) of every pixel of every level in [0, 1]: the references of an encoder, whose queries are the pixels."""
    maps = []
    for Y, X in shapes:
        y, x = ((torch.arange(n, **at) + 0.5) / n for n in (Y, X))
        maps.append(torch.stack([x.expand(Y, X), y[:, None].expand(Y, X)], -1).flatten(0, 1))
    return torch.cat(maps)
