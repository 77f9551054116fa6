"""Which blocks the C++ kernels visit, and the bool tiles that they read inside partly allowed ones."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from regard.masks import BlockLayout, Mask, full
from regard.masks.content import remembered

BLOCK = 128
MOST = 256
"""Queries and keys in a block at most (as in attention.h)."""
PANEL = 32
"""Keys are laid out by so many, or a divisor of it."""


@dataclass(frozen=True)
class Walk:
    """A block layout as attention.cpp reads it, by rows and by columns."""

    block: tuple[int, int]
    heads: tuple[int, int]
    row_ptr: Int[Tensor, " P"]
    cols: Int[Tensor, " N"]
    tile: Int[Tensor, " N"]
    tiles: Bool[Tensor, "n bq bk"]
    col_ptr: Int[Tensor, " Q"]
    rows: Int[Tensor, " N"]
    entry: Int[Tensor, " N"]


def walk_of(mask: Mask | None, T: int, S: int) -> Walk:
    """The mask's own walk."""
    return made(full() if mask is None else mask, T, S)


@remembered(16)
def made(mask: Mask, T: int, S: int) -> Walk:
    mask = mask.to("cpu")
    layout = mask.layout(T, S, block=block_of(mask))
    nq = layout.shape[2]
    line = layout.rows
    r, head = line % nq, line // nq
    tile = torch.full_like(layout.cols, -1, dtype=torch.int32)
    partial = (~layout.full).nonzero().flatten()
    tiles, index = _tiles(mask, layout, head[partial], r[partial], layout.cols[partial])
    tile[partial] = index.int()
    return walk(layout.block, layout.shape, layout.row_ptr, layout.cols, tile, tiles)


def walk(
    block: tuple[int, int],
    shape: tuple[int, int, int, int],
    row_ptr: Int[Tensor, " P"],
    cols: Int[Tensor, " N"],
    tile: Int[Tensor, " N"],
    tiles: Bool[Tensor, "n bq bk"],
) -> Walk:
    """The walk over stored blocks as in `BlockLayout`; tile -1 is full, others count in `tiles`."""
    Bm, Hm, nq, nk = shape
    line = torch.arange(Bm * Hm * nq, device="cpu").repeat_interleave(row_ptr.diff())
    column = line // nq * nk + cols
    entry = column.argsort(stable=True)
    col_ptr = F.pad(torch.bincount(column, minlength=Bm * Hm * nk).cumsum(0), (1, 0))
    return Walk(block, (Bm, Hm), row_ptr, cols, tile, tiles, col_ptr, line[entry] % nq, entry)


def block_of(mask: Mask) -> tuple[int, int]:
    """Its own grain where whole panels fit, else `BLOCK`."""
    q, k = mask.grain or (BLOCK, BLOCK)
    return (q if PANEL <= q <= MOST else BLOCK), (k if k % PANEL == 0 and k <= MOST else BLOCK)


def _tiles(mask: Mask, layout: BlockLayout, head: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The mask inside these blocks (n, bq, bk), and which of them each block reads."""
    (bq, bk), Hm = layout.block, layout.shape[1]
    index = torch.arange(len(r), device="cpu")
    if mask.is_shift_invariant and len(r):
        _, index = torch.unique(c * bk - r * bq, return_inverse=True)
        first = torch.full((int(index.max()) + 1,), len(r), device="cpu").scatter_reduce_(
            0, index, torch.arange(len(r), device="cpu"), "amin"
        )
        head, r, c = head[first], r[first], c[first]
    i = r[:, None, None] * bq + torch.arange(bq, device="cpu")[:, None] + layout.S - layout.T
    j = c[:, None, None] * bk + torch.arange(bk, device="cpu")
    if not mask.is_shift_invariant:
        i, j = i.clamp(max=layout.S - 1), j.clamp(max=layout.S - 1)
    b, h = (x[:, None, None] for x in (head // Hm, head % Hm))
    pieces = [
        mask(b[at], h[at], i[at], j[at]).expand(-1, bq, bk).contiguous()
        for at in torch.arange(len(r), device="cpu").split(256)
    ]
    return torch.cat(pieces) if pieces else torch.empty(0, bq, bk, dtype=torch.bool, device="cpu"), index
