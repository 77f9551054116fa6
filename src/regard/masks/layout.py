"""Which blocks of the T x S matrix hold anything at all: what a block-sparse kernel walks over.

Masks judge whole blocks by interval arithmetic; only blocks about which they can't be sure are looked into, a
bounded number at a time. Row blocks are taken in chunks, and only columns within the mask's span are looked
at: memory follows the number of stored blocks, never T x S.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.masks.checks import integer, lengths, tensor
from regard.masks.verdict import Tiles

if TYPE_CHECKING:
    from regard.masks.algebra import Mask

BUDGET = 2**20
"""Entries looked at together, of blocks and of tiles alike."""


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The blocks that hold something, as compressed rows.

    Query block r holds queries [r * bq, (r + 1) * bq), key block c keys [c * bk, (c + 1) * bk); the last ones
    may be ragged. Row n = (b * Hm + h) * nq + r stores columns cols[row_ptr[n] : row_ptr[n + 1]], ascending.
    """

    block: tuple[int, int]
    """(bq, bk)."""
    T: int
    S: int
    shape: tuple[int, int, int, int]
    """(Bm, Hm, nq, nk); Bm and Hm are 1 where all batch entries or heads share it."""
    row_ptr: Int[Tensor, " P"]
    cols: Int[Tensor, " N"]
    full: Bool[Tensor, " N"]
    """Per stored block: every entry (within T and S) is allowed, so that the predicate need not be asked."""

    @property
    def num_blocks(self) -> int:
        """How many blocks are stored."""
        return self.cols.shape[0]

    @property
    def block_density(self) -> float:
        """The stored share of all blocks (0 where there are none)."""
        B, H, nq, nk = self.shape
        return self.num_blocks / max(1, B * H * nq * nk)

    @property
    def rows(self) -> Int[Tensor, " N"]:
        """The row number n of each stored block."""
        count = self.row_ptr.diff()
        return torch.arange(len(count), device=count.device).repeat_interleave(count)

    def to(self, device: torch.device | str) -> "BlockLayout":
        return replace(self, row_ptr=self.row_ptr.to(device), cols=self.cols.to(device), full=self.full.to(device))

    def to_dense_blocks(self) -> Bool[Tensor, "Bm Hm nq nk"]:
        """True where a block is stored."""
        return self._scatter(torch.ones_like(self.full))

    def to_dense_full(self) -> Bool[Tensor, "Bm Hm nq nk"]:
        """True where a block is stored and full."""
        return self._scatter(self.full)

    def _scatter(self, values: Tensor) -> Tensor:
        B, H, nq, nk = self.shape
        grid = values.new_zeros(B * H * nq, nk)
        grid[self.rows, self.cols] = values
        return grid.view(self.shape)

    def __and__(self, other: "BlockLayout") -> "BlockLayout":
        """Blocks stored in both; full where full in both. Batch and head sizes of 1 broadcast."""
        if (self.block, self.T, self.S) != (other.block, other.T, other.S):
            mine, theirs = ((x.block, x.T, x.S) for x in (self, other))
            raise ValueError(f"layout &: block, T and S must agree (got {mine} and {theirs})")
        stored = self.to_dense_blocks() & other.to_dense_blocks()
        full = self.to_dense_full() & other.to_dense_full()
        return BlockLayout.from_blocks(stored, self.T, self.S, self.block, full=full)

    @classmethod
    def from_blocks(
        cls,
        tiles: Bool[Tensor, "B H nq nk"],
        T: int,
        S: int,
        block: int | tuple[int, int],
        *,
        full: Bool[Tensor, "B H nq nk"] | None = None,
    ) -> "BlockLayout":
        """The layout that stores the true tiles; `full` says which hold no forbidden entry (default: all)."""
        T, S = lengths("from_blocks", T, S)
        bq, bk = pair(block)
        nq, nk = -(-T // bq), -(-S // bk)
        full = tiles if full is None else full
        for what, value in (("tiles", tiles), ("full", full)):
            got = tensor(f"from_blocks: {what}", value, (4,), "bool").shape
            if got[2:] != (nq, nk):
                need = f"(B, H, {nq}, {nk}) for T={T}, S={S}, block={(bq, bk)}"
                raise ValueError(f"from_blocks: {what} must be {need} (got {tuple(got)})")
        full = full.broadcast_to(tiles.shape)
        row_ptr = torch.nn.functional.pad(tiles.sum(-1).flatten().cumsum(0), (1, 0))
        cols = tiles.nonzero()[:, 3].contiguous()
        return cls((bq, bk), T, S, (tiles.shape[0], tiles.shape[1], nq, nk), row_ptr, cols, full[tiles])


def pair(block: int | tuple[int, int]) -> tuple[int, int]:
    """(bq, bk) from one size for both, or from two."""
    sizes = block if isinstance(block, tuple) else (block, block)
    if len(sizes) != 2:
        raise ValueError(f"layout: block must be an int or a pair of ints (got {block})")
    return integer("layout: block", sizes[0]), integer("layout: block", sizes[1])


class Judged(NamedTuple):
    """Blocks that may hold something, and what is known of them."""

    where: Int[Tensor, "n 4"]
    """b, h, query block, key block."""
    some: Bool[Tensor, " n"]
    full: Bool[Tensor, " n"]
    may_full: Bool[Tensor, " n"]


def judged(mask: "Mask", T: int, S: int, block: tuple[int, int]) -> Iterator[Judged]:
    """Walk over the blocks, some row blocks at a time."""
    (bq, bk), (back, ahead) = block, mask.span
    nq, nk = -(-T // bq), -(-S // bk)
    step = max(1, min(64, BUDGET // max(1, mask.batch * mask.heads * nk)))
    for row in range(0, nq, step):
        last_row = min(row + step, nq)
        first_i, last_i = row * bq + S - T, min(last_row * bq, T) - 1 + S - T
        first_j, last_j = max(0, first_i - back), min(S - 1, last_i + ahead)
        if first_j > last_j:
            continue
        column = int(first_j) // bk
        r, c = (
            torch.arange(row, last_row, device="cpu")[:, None],
            torch.arange(column, int(last_j) // bk + 1, device="cpu"),
        )
        r, c = r[None, None], c[None, None, None]
        i_hi, j_hi = (r * bq + bq).clamp(max=T) - 1 + S - T, (c * bk + bk).clamp(max=S) - 1
        verdict = mask.judge(Tiles(r * bq + S - T, i_hi, c * bk, j_hi))
        shape = (mask.batch, mask.heads, r.shape[2], c.shape[3])
        where = verdict.may.broadcast_to(shape).nonzero()
        known = (verdict.some, verdict.full, verdict.may_full)
        found = (x.broadcast_to(shape)[tuple(where.T)] for x in known)
        yield Judged(where + torch.tensor([0, 0, row, column], device="cpu"), *found)


def areas(where: Int[Tensor, "n 4"], T: int, S: int, block: tuple[int, int]) -> Int[Tensor, " n"]:
    """How many entries each block has."""
    (bq, bk), (r, c) = block, where[:, 2:].unbind(1)
    return (T - r * bq).clamp(max=bq) * (S - c * bk).clamp(max=bk)


def inspect(mask: "Mask", where: Int[Tensor, "n 4"], T: int, S: int, block: tuple[int, int]) -> Int[Tensor, " n"]:
    """How many entries of each block are allowed, by asking the predicate."""
    bq, bk = block
    counts = [torch.zeros(0, dtype=torch.long, device="cpu")]
    for some in where.split(max(1, BUDGET // (bq * bk))):
        b, h, r, c = some[:, :, None, None].unbind(1)
        t, j = r * bq + torch.arange(bq, device="cpu")[:, None], c * bk + torch.arange(bk, device="cpu")
        # Beyond a ragged end, rules are asked about the last entry again: they may have tables of this very length.
        allowed = mask(b, h, t.clamp(max=T - 1) + S - T, j.clamp(max=S - 1)) & (t < T) & (j < S)
        counts.append(allowed.broadcast_to(len(some), bq, bk).sum((1, 2)))
    return torch.cat(counts)


def within(block: tuple[int, int], T: int, S: int) -> tuple[int, int]:
    """The same blocks, no larger than the matrix: what is made for each must not follow a size that was only named."""
    return min(block[0], max(T, 1)), min(block[1], max(S, 1))


def layout(mask: "Mask", T: int, S: int, block: int | tuple[int, int]) -> BlockLayout:
    """Exact: stored if and only if a block allows something, full if and only if it allows everything."""
    block = pair(block)
    inside = within(block, T, S)
    B, H, nq = mask.batch, mask.heads, -(-T // block[0])
    none = torch.zeros(0, dtype=torch.long, device="cpu")
    rows, cols, fulls = [none], [none], [none.bool()]
    for where, some, full, may_full in judged(mask, T, S, inside):
        unsure = ~some | (full != may_full)
        if unsure.any():
            count = inspect(mask, where[unsure], T, S, inside)
            some[unsure], full[unsure] = count > 0, count == areas(where[unsure], T, S, inside)
        b, h, r, c = where[some].unbind(1)
        rows.append((b * H + h) * nq + r)
        cols.append(c)
        fulls.append(full[some])
    row, order = torch.cat(rows).sort(stable=True)
    row_ptr = torch.searchsorted(row, torch.arange(B * H * nq + 1, device="cpu"))
    return BlockLayout(
        block, T, S, (B, H, nq, -(-S // block[1])), row_ptr, torch.cat(cols)[order], torch.cat(fulls)[order]
    )


def count(mask: "Mask", T: int, S: int) -> int:
    """The number of allowed entries."""
    if T == 0 or S == 0:
        return 0
    if mask.is_shift_invariant:
        # Whole diagonals are allowed or not: sum their lengths.
        distance = torch.arange(1 - T, S, device="cpu")
        zero = torch.zeros_like(distance)
        size = torch.minimum(S - 1 - distance, zero + S - 1) - (S - T - distance).clamp(min=0) + 1
        return int(size[mask(zero, zero, distance, zero)].sum())
    total, block = 0, (128, 128)
    for where, _, full, _ in judged(mask, T, S, block):
        whole, partly = where[full], where[~full]
        total += int(areas(whole, T, S, block).sum()) + int(inspect(mask, partly, T, S, block).sum())
    return total
