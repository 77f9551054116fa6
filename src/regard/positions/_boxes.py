"""Boxes that tokens stand in, as positions with four coordinates: x0, y0, x1, y1."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def boxes_at(positions: Int[Tensor, "*b T"] | Float[Tensor, "*b T 4"]) -> Tensor:
    """The boxes where some were given, (B or 1, T, 4). Counted tokens stand in a line, each in a box of 1 x 1."""
    if positions.dim() == 3:
        return positions
    x = positions.clamp(min=0)  # pads before the first token may count from below
    zero = torch.zeros_like(x)
    return torch.stack([x, zero, x + 1, zero + 1], -1)
