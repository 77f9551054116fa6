"""Exact attention over the blocks that a mask (or a selector) leaves, and no others.

For every block of queries, the keys of its allowed blocks are taken together (as a view where they are neighbours) and
attended to at once; blocks that hold no allowed pair cost nothing. Any stage that needs no other query rows runs.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.kernels import sdpa
from regard.kernels.problem import Keys, Problem, attend
from regard.masks import BlockLayout, Mask

BLOCK = 128
SMALLEST = 16
"""Blocks of fewer queries or keys are not worth a call each."""


def block_of(mask: Mask) -> tuple[int, int]:
    """The blocks to cut this mask into: its own grain where it has one, else `BLOCK`."""
    q, k = mask.grain or (BLOCK, BLOCK)
    return q if q >= SMALLEST else BLOCK, k if k >= SMALLEST else BLOCK


def why_not(p: Problem) -> list[str]:
    """It needs a mask to take blocks from, and rows that can be computed a block at a time."""
    reasons = []
    if p.mask is None:
        reasons.append("no mask, so there are no empty blocks to leave out")
    if p.halo:
        reasons.append(f"a stage reads {p.halo} earlier query rows, which may need other key blocks")
    if p.first_key:
        reasons.append("the cache has dropped keys already; what is left is dense")
    return reasons


def run(p: Problem, layout: BlockLayout | None = None) -> Tensor:
    """(B, H, T, V). The layout is the mask's own unless a selector hands in a smaller one."""
    B, H, G, T, S = p.shape
    if layout is None:
        assert p.mask is not None
        layout = p.mask.layout(T, S, block=block_of(p.mask))
    if T == 0 or S == 0:
        return attend(p, slice(0, T), slice(0, S))
    Bm, Hm = layout.shape[:2]
    blocks, full = layout.to_dense_blocks(), layout.to_dense_full()
    if Bm == Hm == 1 or p.stages or p.bias is not None:
        # Stages hold parameters per head and can't be cut along heads: all heads take the union of their blocks.
        return _rows(p, layout, blocks.any(1).any(0), full.all(1).all(0))
    outs = [
        _rows(_one(p, b, h, H // G), layout, blocks[b % Bm, h % Hm], full[b % Bm, h % Hm])
        for b in range(B)
        for h in range(H)
    ]
    return torch.cat(outs).view(B, H, T, -1)


@dataclass(frozen=True)
class _At(Mask):
    """A mask as one batch row and head see it."""

    mask: Mask
    b: int
    h: int

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.mask(b + self.b, h + self.h, i, j)


def _one(p: Problem, b: int, h: int, group: int) -> Problem:
    """Batch row b, head h alone."""
    g = h // group
    mask = None if p.mask is None else _At(p.mask, b, h)
    return replace(p, q=p.q[b : b + 1, h : h + 1], k=p.k[b : b + 1, g : g + 1], v=p.v[b : b + 1, g : g + 1], mask=mask)


def _rows(p: Problem, layout: BlockLayout, blocks: Tensor, full: Tensor) -> Tensor:
    """All query blocks, one after another; `blocks` and `full` are (nq, nk) bool."""
    (bq, bk), T, S = layout.block, p.q.shape[2], p.k.shape[2]
    fusable = not sdpa.why_not(p)
    outs = []
    for r, (row, row_full) in enumerate(zip(blocks, full, strict=True)):
        rows = slice(r * bq, min((r + 1) * bq, T))
        cols = row.nonzero().flatten()
        keys = _keys(cols, bk, S)
        here = replace(p, mask=None) if len(cols) and bool(row_full[cols].all()) else p
        run = sdpa.fused if fusable and len(cols) else attend
        if torch.is_grad_enabled() and (p.stages or p.bias is not None):
            # Or every block's scores or bias would wait for backward.
            outs.append(checkpoint(run, here, rows, keys, use_reentrant=False, preserve_rng_state=p.dropout > 0))
        else:
            outs.append(run(here, rows, keys))
    return torch.cat(outs, 2)


def _keys(cols: Tensor, bk: int, S: int) -> Keys:
    """The keys of these blocks: a slice where the blocks are neighbours, else their indices."""
    if len(cols) == 0:
        return slice(0, 0)
    first, last = int(cols[0]), int(cols[-1])
    if last - first + 1 == len(cols):
        return slice(first * bk, min((last + 1) * bk, S))
    keys = (cols[:, None] * bk + torch.arange(bk, device=cols.device)).flatten()
    return keys[keys < S]
