"""Which blocks a Triton kernel visits, as flat lists on the device, and the few mask tiles that it reads.

A mask's block layout is cut into two lists for each row of query blocks: blocks that are full, about which no mask is
asked, then partial ones, each with the number of a bool tile. Where the mask depends on i - j alone, blocks on the same
diagonal share a tile, so that causal masks and windows need one or two in all. The same lists stand there a second
time by columns, for the gradients of keys and values.
"""

from typing import NamedTuple

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from regard.masks import BlockLayout, Mask
from regard.masks.content import remembered

BUDGET = 2**24
"""Mask entries asked for at once."""


class Lists(NamedTuple):
    """Line n (a row or a column of blocks) has full blocks at[start[n] : middle[n]], then partial ones."""

    start: Int[Tensor, " P"]
    middle: Int[Tensor, " n"]
    at: Int[Tensor, " N"]
    tile: Int[Tensor, " N"]
    """The number of each block's tile; -1 for full ones."""


class Walk(NamedTuple):
    """A layout as the kernels read it. Line numbers are (b * Hm + h) * nq + r, and (b * Hm + h) * nk + c by columns."""

    rows: Lists
    columns: Lists
    tiles: UInt8[Tensor, "U bq bk"]
    batch: int
    """1, or the batch size that the lists are made for."""
    heads: int

    @property
    def tensors(self) -> list[Tensor]:
        """Everything in one list: start, middle, at, tile by rows, the same by columns, tiles."""
        return [*self.rows, *self.columns, self.tiles]


@remembered(16)
def walk(mask: Mask, T: int, S: int, block: tuple[int, int], device: torch.device) -> Walk:
    """The lists, from the mask's layout."""
    layout = mask.layout(T, S, block=block)
    Bm, Hm, nq, nk = layout.shape
    line, r = layout.rows // max(nq, 1), layout.rows % max(nq, 1)
    where = torch.stack([line // Hm, line % Hm, r, layout.cols], 1)
    partial = ~layout.full
    tiles, number = _tiles(mask.to(device), where[partial], layout, device)
    tile = torch.full_like(layout.cols, -1)
    tile[partial] = number
    return Walk(
        _lists(layout.rows, layout.cols, tile, Bm * Hm * nq, device),
        _lists(line * nk + layout.cols, r, tile, Bm * Hm * nk, device),
        tiles,
        Bm,
        Hm,
    )


def _lists(line: Tensor, at: Tensor, tile: Tensor, lines: int, device: torch.device) -> Lists:
    """Sorted by line, and full blocks before partial ones."""
    key = 2 * line + (tile >= 0)
    order = key.argsort(stable=True)
    edges = torch.searchsorted(key[order], torch.arange(2 * lines + 1, device="cpu"))
    found = (edges[::2], edges[1::2], at[order], tile[order])
    return Lists(*(x.to(device=device, dtype=torch.int32).contiguous() for x in found))


def _tiles(mask: Mask, where: Tensor, layout: BlockLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tiles of these blocks, and which tile each block has."""
    (bq, bk), (T, S) = layout.block, (layout.T, layout.S)
    row, column = torch.arange(bq, device=device)[:, None], torch.arange(bk, device=device)
    if mask.is_shift_invariant:
        # i - j of a block's first entry says everything, also past the edges, which kernels cut off themselves.
        shift, number = (where[:, 2] * bq - where[:, 3] * bk + S - T).unique(return_inverse=True)
        zero = torch.zeros((), dtype=torch.long, device=device)
        tiles = mask(zero, zero, shift.to(device)[:, None, None] + row, column)
        return tiles.expand(len(shift), bq, bk).to(torch.uint8).contiguous(), number
    tiles = torch.empty(len(where), bq, bk, dtype=torch.uint8, device=device)
    size = max(1, BUDGET // (bq * bk))
    for some, out in zip(where.to(device).split(size), tiles.split(size), strict=True):
        b, h, r, c = some[:, :, None, None].unbind(1)
        out.copy_(mask(b, h, (r * bq + row).clamp(max=T - 1) + S - T, (c * bk + column).clamp(max=S - 1)))
    return tiles, torch.arange(len(where), device="cpu")
