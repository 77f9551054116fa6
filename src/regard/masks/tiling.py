"""What a kernel by tiles gains from a neighborhood: how many tiles of keys each tile of queries must visit."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from regard.checks import refuse
from regard.masks.grids import Axis, Neighborhood, _each


class TileCost(NamedTuple):
    """What tiles of keys a tile of queries visits."""

    visited: float
    """How many, in the mean over all tiles of queries."""
    tiles: int
    """How many there are."""
    speedup: float
    """tiles / visited, over attention to the whole map."""
    bound: float
    """Pairs of the whole map over pairs of the windows, which no tiles can beat without causality."""
    perfect: bool
    """Whether the bound is reached, and no visited tile needs a mask."""


def tile_cost(
    mask: Neighborhood, q_tile: int | Sequence[int], k_tile: int | Sequence[int], *, dynamic: bool = False
) -> TileCost:
    """The speed-up that a kernel of such tiles can have (Hassani et al. 2025, arXiv 2504.16922; reconstructed).

    Tokens are laid out so that a tile is a box of neighbours, and each dilation group is apart. A tile of queries
    visits the tiles of keys that overlap the box of all keys that it sees.

    Args:
        q_tile, k_tile: sides of the tiles along all axes, or along each.
        dynamic: whether tiles of keys start where a box starts, and not at multiples of their size.

    Raises:
        TypeError: mask is no neighborhood.
    """
    if not isinstance(mask, Neighborhood):
        refuse("tile_cost", "mask", "is no neighborhood", type(mask).__name__, "masks.neighborhood", error=TypeError)
    count = len(mask.axes)
    sides = (_each("tile_cost", name, z, count) for name, z in (("q_tile", q_tile), ("k_tile", k_tile)))
    found = [_along(axis, q, k, dynamic) for axis, q, k in zip(mask.axes, *sides, strict=True)]
    visited, tiles = math.prod(mean for mean, _, _ in found), math.prod(n for _, n, _ in found)
    bound = math.prod(axis.size / axis.window for axis in mask.axes)
    needless = all(all_seen for _, _, all_seen in found) and math.isclose(tiles / visited, bound)
    return TileCost(visited, tiles, tiles / visited, bound, needless)


def _along(axis: Axis, q_tile: int, k_tile: int, dynamic: bool) -> tuple[float, int, bool]:
    """Of one axis: tiles visited in the mean, tiles that there are, and whether all that is visited is seen."""
    visits, whole = [], True
    for group in range(axis.dilation):
        places = torch.arange(group, axis.size, axis.dilation)
        first, last = (edge // axis.dilation for edge in axis.bounds(places))
        for low, high in zip(first.split(q_tile), last.split(q_tile), strict=True):
            start, end = int(low.min()), int(high.max()) + 1
            start = start if dynamic else start // k_tile * k_tile
            visits.append(-(-(end - start) // k_tile))
            end = min(start + visits[-1] * k_tile, len(places))
            whole &= bool((low == start).all() and (high == end - 1).all())
    return sum(visits) / len(visits), -(-axis.size // k_tile), whole
