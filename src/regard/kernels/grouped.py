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


def apart(p: Problem) -> bool:
    """Whether neighbouring queries chose so differently that blocks of them would see four times as many keys: then no
    other kernel need be asked for its price, which takes as long as choosing."""
    choice = _choice(p)
    assert choice is not None
    few = choice.tiles[:, :, : choice.T // GROUP * GROUP].unflatten(2, (-1, GROUP))
    return few.numel() > 0 and int(few.sum()) * 4 < int(few.any(3).sum()) * GROUP


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
    if not isinstance(p.mask, And):
        out, lse = _past(p, tiles, bk)
        share = _shares(lse)
        return (share[..., None, :] @ out.to(share.dtype)).squeeze(3).to(p.v.dtype)
    # Causal: apart from the others goes the block in which a query stands.
    out, lse = _past(p, tiles & (first + bk <= i + 1), bk)
    own = tiles & (first <= i) & (first + bk > i + 1)
    near, near_lse = native.with_lse(replace(p, mask=CAUSAL & blocks(bk)))
    share = _shares(torch.cat([lse, near_lse.masked_fill(~own.any(3), -torch.inf)[..., None]], 3))
    past = (share[..., None, :-1] @ out.to(share.dtype)).squeeze(3)
    return (past + share[..., -1:] * near.to(share.dtype)).to(p.v.dtype)


def _shares(lse: Float[Tensor, "B H T c"]) -> Float[Tensor, "B H T c"]:
    """What each part counts; nothing where all are empty."""
    top = lse.detach().amax(3, keepdim=True)
    share = (lse - top.masked_fill(top == -torch.inf, 0)).exp()
    return share / share.sum(3, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)


def _past(
    p: Problem, tiles: Bool[Tensor, "B H T n"], bk: int
) -> tuple[Float[Tensor, "B H T c V"], Float[Tensor, "B H T c"]]:
    """What each query gets from each of its blocks alone, and the log-sum-exp; -inf where it has fewer blocks."""
    B, H, T, n = tiles.shape
    bh, t, block = tiles.flatten(0, 1).nonzero().unbind(1)  # few of all pairs, and those of a query side by side
    if len(t) == 0:
        return nothing(p, B, H, T, 1, p.v.shape[3]), torch.full((B, H, T, 1), -torch.inf, device="cpu")
    query, group = bh * T + t, bh * n + block
    slot, most = _places(query, B * H * T)
    order = group.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order], _ = _places(group[order], B * H * n)
    size = -(-group.bincount(minlength=B * H * n).view(B * H, n) // GROUP)  # of each group, in blocks of rows
    row = (size.cumsum(1) - size).flatten()[group] * GROUP + rank
    total = int(size.sum(1).max()) * GROUP
    where = torch.full((B * H * T, most), total, device="cpu")  # one row too many, for what is not chosen
    where[query, slot] = row
    where = where.view(B, H, T, most)
    asked = torch.arange(0, B * H * T, T, device="cpu")[:, None].repeat(1, total)
    asked[bh, row] = query
    q = p.q.flatten(0, 2).index_select(0, asked.flatten()).view(B, H, total, -1)
    out, lse = native.with_lse(replace(p, q=q, mask=None), _walk(size, (B, H), bk, p.k.shape[2]))
    lse = torch.cat([lse, lse.new_full((B, H, 1), -torch.inf)], 2).gather(2, where.flatten(2)).view(where.shape)
    at = where.clamp(max=total - 1) + torch.arange(0, B * H * total, total, device="cpu").view(B, H, 1, 1)
    return out.flatten(0, 2).index_select(0, at.flatten()).view(B, H, T, most, -1), lse


def _places(sorted_: Int[Tensor, " n"], kinds: int) -> tuple[Int[Tensor, " n"], int]:
    """The place of each among those of its kind, which stand together, and the largest number of one kind."""
    count = sorted_.bincount(minlength=kinds)
    return torch.arange(len(sorted_), device="cpu") - (count.cumsum(0) - count)[sorted_], int(count.max())


def _walk(size: Int[Tensor, "BH n"], heads: tuple[int, int], bk: int, S: int) -> native.Walk:
    """Over gathered queries, `size` blocks of rows for each block of keys."""
    (B, H), n, rows = heads, size.shape[1], int(size.sum(1).max())
    # Every block of rows sees the pieces of its one block of keys.
    piece = next(w for w in (256, 128, 64, native.PANEL) if bk % w == 0)
    each = bk // piece
    owner = torch.full((B * H, rows), n, device="cpu")
    block = torch.arange(n, device="cpu").repeat(B * H).repeat_interleave(size.flatten())
    bh = torch.arange(B * H, device="cpu").repeat_interleave(size.sum(1))
    at, _ = _places(bh, B * H)
    owner[bh, at] = block
    cols = owner[..., None] * each + torch.arange(min(each, -(-S // piece)), device="cpu")
    stored = cols * piece < S
    row_ptr = torch.nn.functional.pad(stored.sum(2).flatten().cumsum(0), (1, 0))
    cols = cols[stored]
    shape, tile = (B, H, rows, -(-S // piece)), torch.full_like(cols, -1, dtype=torch.int32)
    empty = torch.empty(0, GROUP, piece, dtype=torch.bool, device="cpu")
    return native.walk((GROUP, piece), shape, row_ptr, cols, tile, empty)


def _choice(p: Problem) -> Chosen | None:
    """The mask's choice, if it is one by single queries of blocks that the native kernel can walk."""
    parts = p.mask.parts if isinstance(p.mask, And) else (p.mask,)
    found = [m for m in parts if isinstance(m, Chosen) and m.block[0] == 1 and m.block[1] % native.PANEL == 0]
    others = [m for m in parts if m not in found and m != CAUSAL]
    return found[0] if len(found) == 1 and not others else None
