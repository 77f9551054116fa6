"""Exact attention where every query picked whole blocks of keys for itself: queries gathered by the block they picked.

Neighbouring queries pick different blocks, so blocks of queries would visit nearly all keys. Here all queries that
picked a block form a group of their own and see that block alone; what a query gets from its blocks is put together by
the log-sum-exp of each part:

    out_t = sum_c e^(lse_tc - lse_t) out_tc,   lse_t = log sum_c e^lse_tc

The block in which a causal query itself stands is the one that is partly hidden; all queries' own blocks are a second,
block-diagonal pass. It computes any mask of this kind, MoBA's (arXiv 2502.13189) being the one in the catalogue;
how the paper's own implementation goes about it was not read.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.kernels import native
from regard.kernels.cost import Cost, io, products
from regard.kernels.problem import CAUSAL, Problem, nothing
from regard.masks import blocks
from regard.masks.algebra import And
from regard.masks.selection import Chosen

GROUP = 64
"""Rows of gathered queries that run together; a group is filled up to whole ones."""


def why_not(p: Problem) -> list[str]:
    """Choices by single queries, perhaps causal, and what the native kernel can run."""
    if _choice(p) is None:
        return ["no mask in which every query chose whole blocks of keys for itself, alone or with causality"]
    plain = [f"{type(s).__name__}: only plain softmax" for s in p.stages] + ["a bias"] * (p.bias is not None)
    return plain or native.why_not(p)


def cost(p: Problem) -> Cost:
    """The chosen pairs, of each query's own block only half, with queries and outputs copied by group."""
    T, S = p.shape[3:]
    choice = _choice(p)
    assert choice is not None
    share = float(choice.tiles.float().mean())
    pairs = T * S * share + T * GROUP
    copied = 4.0 * io(p) * share * choice.tiles.shape[3]
    words = f"queries grouped by the blocks they chose, {share:.0%} of all pairs"
    return Cost(products(p, pairs), copied, 150, words, io(p), "native")


def run(p: Problem) -> Tensor:
    """(B, H, T, V)."""
    if p.q.is_meta:
        return nothing(p, *p.q.shape[:3], p.v.shape[3])
    choice = _choice(p)
    assert choice is not None
    B, H, _, T, S = p.shape
    bk = choice.block[1]
    tiles = choice.tiles.expand(B, H, T, -1)
    i, first = torch.arange(S - T, S, device="cpu")[:, None], torch.arange(tiles.shape[3], device="cpu") * bk
    whole = tiles
    parts = []
    if isinstance(p.mask, And):  # causal
        whole = tiles & (first + bk <= i + 1)
        own = tiles & (first <= i) & (first + bk > i + 1)
        out, lse = native.with_lse(replace(p, mask=CAUSAL & blocks(bk)))
        parts.append((out[:, :, :, None], lse.masked_fill(~own.any(3), -torch.inf)[..., None]))
    parts.insert(0, _past(p, whole, bk))
    outs, lses = (torch.cat(x, 3) for x in zip(*parts, strict=True))
    top = lses.detach().amax(3, keepdim=True)
    weights = (lses - top.masked_fill(top == -torch.inf, 0)).exp()
    weights = weights / weights.sum(3, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return (weights[..., None, :] @ outs.to(weights.dtype)).squeeze(3).to(p.v.dtype)


def _past(
    p: Problem, tiles: Bool[Tensor, "B H T n"], bk: int
) -> tuple[Float[Tensor, "B H T c V"], Float[Tensor, "B H T c"]]:
    """What each query gets from each of its blocks alone, and the log-sum-exp; -inf where it has fewer blocks."""
    B, H, T, _ = tiles.shape
    chosen = int(tiles.sum(3).max()) if tiles.numel() else 0
    if chosen == 0:
        return nothing(p, B, H, T, 1, p.v.shape[3]), torch.full((B, H, T, 1), -torch.inf, device="cpu")
    row, total, walk = _groups(tiles, bk, p.k.shape[2])
    slot = tiles.cumsum(3) - 1
    # One slot and one row too many, for what is not chosen.
    where = torch.full((B, H, T, chosen + 1), total, device="cpu")
    where.scatter_(3, slot.masked_fill(~tiles, chosen), row.masked_fill(~tiles, total))
    where = where[..., :chosen]
    query = torch.zeros(B, H, total + 1, dtype=torch.long, device="cpu")
    query.scatter_(2, where.flatten(2), torch.arange(T, device="cpu")[:, None].expand(B, H, T, chosen).flatten(2))
    q = p.q.gather(2, query[..., :total, None].expand(-1, -1, -1, p.q.shape[3]))
    out, lse = native.with_lse(replace(p, q=q, mask=None), walk)
    lse = torch.cat([lse, lse.new_full((B, H, 1), -torch.inf)], 2).gather(2, where.flatten(2)).view(where.shape)
    at = where.clamp(max=total - 1).flatten(2)[..., None].expand(-1, -1, -1, out.shape[3])
    out = out.gather(2, at).view(B, H, T, chosen, out.shape[3])
    return out, lse


def _groups(tiles: Bool[Tensor, "B H T n"], bk: int, S: int) -> tuple[Int[Tensor, "B H T n"], int, native.Walk]:
    """The row of each (query, block) pair among gathered queries, how many rows there are, and the walk over them."""
    B, H, _, n = tiles.shape
    count = tiles.sum(2)
    size = -(-count // GROUP)  # of each group, in blocks of rows
    start = size.cumsum(2) - size
    rows = int(size.sum(2).max())
    row = start[:, :, None] * GROUP + tiles.cumsum(2) - 1
    # Every block of rows sees the pieces of its one block of keys.
    piece = next(w for w in (256, 128, 64, native.PANEL) if bk % w == 0)
    each = bk // piece
    owner = torch.full((B * H, rows), n, device="cpu")
    pairs = size.flatten(0, 1)
    block = torch.arange(n, device="cpu").repeat(B * H).repeat_interleave(pairs.flatten())
    bh = torch.arange(B * H, device="cpu").repeat_interleave(pairs.sum(1))
    at = torch.arange(len(block), device="cpu") - (pairs.sum(1).cumsum(0) - pairs.sum(1))[bh]
    owner[bh, at] = block
    cols = owner[..., None] * each + torch.arange(min(each, -(-S // piece)), device="cpu")
    stored = cols * piece < S
    row_ptr = torch.nn.functional.pad(stored.sum(2).flatten().cumsum(0), (1, 0))
    cols = cols[stored]
    shape, tile = (B, H, rows, -(-S // piece)), torch.full_like(cols, -1, dtype=torch.int32)
    walk = native.walk(
        (GROUP, piece), shape, row_ptr, cols, tile, torch.empty(0, GROUP, piece, dtype=torch.bool, device="cpu")
    )
    return row, rows * GROUP, walk


def _choice(p: Problem) -> Chosen | None:
    """The mask's choice, if it is one by single queries of blocks that the native kernel can walk."""
    parts = p.mask.parts if isinstance(p.mask, And) else (p.mask,)
    found = [m for m in parts if isinstance(m, Chosen) and m.block[0] == 1 and m.block[1] % native.PANEL == 0]
    others = [m for m in parts if m not in found and m != CAUSAL]
    return found[0] if len(found) == 1 and not others else None
