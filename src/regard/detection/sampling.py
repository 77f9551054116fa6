"""Sums of samples of feature maps: where the points of deformable attention lie, and what is found there."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from regard.tracing import transformed

Sampling = Literal["bilinear", "discrete"]


def sampling_locations(
    reference: Float[Tensor, "B T #L R"],
    offsets: Float[Tensor, "B T H P 2"],
    shapes: Int[Tensor, "L 2"],
    points: Sequence[int],
    *,
    offset_scale: float = 0.5,
) -> Float[Tensor, "B T H P 2"]:
    """Where to look, (x, y) in [0, 1] of each point's own level; the P = sum(points) points are level by level.

    reference: R = 2, points (x, y), from which offsets count in pixels; or R = 4, boxes (cx, cy, w, h), where an offset
    of K_l, the points of its level, is the box's width or height times offset_scale.
    """
    per_point = reference.expand(-1, -1, len(points), -1).split(1, 2)
    ref = torch.cat([r.expand(-1, -1, n, -1) for r, n in zip(per_point, points)], 2)[:, :, None]
    if reference.shape[-1] == 2:
        return ref + offsets / by_point(shapes, points).flip(-1)
    count = torch.cat([offsets.new_full((n, 1), n) for n in points])
    return ref[..., :2] + offsets / count * ref[..., 2:] * offset_scale


def by_point(shapes: Int[Tensor, "L 2"], points: Sequence[int]) -> Int[Tensor, "P 2"]:
    """Each point's (Y, X)."""
    return torch.cat([size.expand(n, 2) for size, n in zip(shapes, points)])


def deformable_attention(
    value: Float[Tensor, "B S H D"],
    shapes: Int[Tensor, "L 2"],
    locations: Float[Tensor, "B T H P 2"],
    weights: Float[Tensor, "B T H P"],
    points: Sequence[int],
    *,
    sampling: Sampling = "bilinear",
) -> Float[Tensor, "B T H D"]:
    """The weighted sum of the values found at these locations.

    value holds the L maps of (Y, X) = shapes[l] pixels one after another, row by row. A bilinear sample is the sum of
    four pixels and a discrete one is one pixel, so each output is one weighted sum of rows of `value`: no sampled map
    and no (T, P, D) tensor is made.
    """
    B, S, H, D = value.shape
    sizes = by_point(shapes, points)
    area = shapes.prod(-1)
    start = by_point((area.cumsum(0) - area)[:, None], points)[:, 0]
    # A location that is not finite lies nowhere: its output must be NaN, not a sample from wherever it is rounded to.
    weights = weights + (0 * locations.detach()).sum(-1)
    row, column, share = (nearest if sampling == "discrete" else corners)(locations.nan_to_num(0, 0, 0), sizes)
    share = share * weights[..., None]
    outside = (column < 0) | (column >= sizes[:, None, 1]) | (row < 0) | (row >= sizes[:, None, 0])
    batch = torch.arange(B, device=value.device)[:, None, None, None, None]
    head = torch.arange(H, device=value.device)[:, None, None]
    at = (batch * S + start[:, None] + row * sizes[:, None, 1] + column) * H + head
    at = at.masked_fill(outside, B * S * H)
    out = weighted_rows(value.reshape(B * S * H, D), at.flatten(3).flatten(0, 2), share.flatten(3).flatten(0, 2))
    return out.view(*locations.shape[:3], D)


def weighted_rows(
    rows: Float[Tensor, "R D"], at: Int[Tensor, "n p"], share: Float[Tensor, "n p"]
) -> Float[Tensor, "n D"]:
    """Sums of rows by their shares. R stands for no row, so that not even NaN times 0 comes from there."""
    none, share = len(rows), share.to(rows.dtype)
    rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    if transformed(rows, share):  # embedding_bag has no forward mode
        return (share[:, None] @ F.embedding(at, rows)).squeeze(1)
    return F.embedding_bag(at, rows, mode="sum", per_sample_weights=share, padding_idx=none)


def corners(
    locations: Float[Tensor, "B T H P 2"], sizes: Int[Tensor, "P 2"]
) -> tuple[Int[Tensor, "B T H P 4"], Int[Tensor, "B T H P 4"], Float[Tensor, "B T H P 4"]]:
    """Row, column and share of the four pixels that a bilinear sample is made of; pixel centres lie at 1/2, 3/2, ..."""
    size = sizes.flip(-1)
    # A pixel beyond the border all four corners are outside, so nothing is lost by stopping there.
    z = torch.minimum((locations * size - 0.5).clamp(min=-2), size + 1)
    corner = z.detach().floor()
    right, below = (z - corner).unbind(-1)
    left, above = 1 - right, 1 - below
    column, row = corner.long().unbind(-1)
    share = torch.stack([left * above, right * above, left * below, right * below], -1)
    return torch.stack([row, row, row + 1, row + 1], -1), torch.stack([column, column + 1] * 2, -1), share


def nearest(
    locations: Float[Tensor, "B T H P 2"], sizes: Int[Tensor, "P 2"]
) -> tuple[Int[Tensor, "B T H P 1"], Int[Tensor, "B T H P 1"], Float[Tensor, "B T H P 1"]]:
    """Row and column of the one pixel of a discrete sample, the border's for locations outside."""
    size = sizes.flip(-1)
    z = torch.minimum((locations.detach() * size + 0.5).clamp(min=0), size - 1).long()[..., None, :]
    return z[..., 1], z[..., 0], torch.ones_like(z[..., 0], dtype=locations.dtype)
