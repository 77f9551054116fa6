"""What a mask can say about whole tiles of the T x S matrix without looking inside them.

A tile is the rectangle i_lo..i_hi, j_lo..j_hi, both ends included. "Is any entry allowed?" and "are all?" are
each answered yes, no or don't know, written as a lower and an upper bound.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Bounds of tiles, each (1, 1, rows or 1, columns or 1), so that masks can tell batch rows and heads apart."""

    i_lo: Int[Tensor, "1 1 #r #c"]
    i_hi: Int[Tensor, "1 1 #r #c"]
    j_lo: Int[Tensor, "1 1 #r #c"]
    j_hi: Int[Tensor, "1 1 #r #c"]


@dataclass(frozen=True)
class Verdict:
    """Three-valued answers; `some <= may` and `full <= may_full`, equal where the answer is known."""

    some: Bool[Tensor, "..."]
    """Surely an entry is allowed."""
    may: Bool[Tensor, "..."]
    """Possibly an entry is allowed."""
    full: Bool[Tensor, "..."]
    """Surely all entries are."""
    may_full: Bool[Tensor, "..."]
    """Possibly all entries are."""

    @classmethod
    def exact(cls, some: Tensor, full: Tensor) -> "Verdict":
        return cls(some, some, full, full)

    @classmethod
    def unknown(cls, tiles: Tiles) -> "Verdict":
        no = torch.zeros_like(tiles.i_lo + tiles.j_lo, dtype=torch.bool)
        return cls(no, ~no, no, ~no)

    def __and__(self, other: "Verdict") -> "Verdict":
        some = (self.full & other.some) | (self.some & other.full)
        return Verdict(some, self.may & other.may, self.full & other.full, self.may_full & other.may_full)

    def __invert__(self) -> "Verdict":
        return Verdict(~self.may_full, ~self.full, ~self.may, ~self.some)

    def __or__(self, other: "Verdict") -> "Verdict":
        return ~(~self & ~other)


def corners(cells: Bool[Tensor, "B H nq nk"]) -> Int[Tensor, "B H nq_1 nk_1"]:
    """How many cells above and left of each corner are True, on the CPU."""
    narrow = torch.int32 if cells.shape[2] * cells.shape[3] < 2**31 else torch.int64
    return torch.nn.functional.pad(cells.cpu().cumsum(3, dtype=narrow).cumsum(2, dtype=narrow), (1, 0, 1, 0))


def counted(
    before: Int[Tensor, "B H nq_1 nk_1"], tiles: Tiles, T: int, S: int, block: tuple[int, int] = (1, 1)
) -> Verdict:
    """What is certain about tiles where cells of `block` are allowed whole or not at all, by their `corners`.

    The last T of S positions are the queries; beyond them, and beyond the keys, nothing is allowed.
    """
    (bq, bk), (nq, nk) = block, (before.shape[2] - 1, before.shape[3] - 1)
    shift = S - T
    t_lo, t_hi = (tiles.i_lo - shift).clamp(min=0), (tiles.i_hi - shift).clamp(max=T - 1)
    j_lo, j_hi = tiles.j_lo.clamp(min=0), tiles.j_hi.clamp(max=S - 1)
    inside = (t_lo == tiles.i_lo - shift) & (t_hi == tiles.i_hi - shift)
    inside = inside & (j_lo == tiles.j_lo) & (j_hi == tiles.j_hi)
    top, bottom = (t_lo // bq).clamp(0, nq), (t_hi // bq + 1).clamp(0, nq)
    left, right = (j_lo // bk).clamp(0, nk), (j_hi // bk + 1).clamp(0, nk)
    count = before[..., bottom, right] - before[..., top, right] - before[..., bottom, left] + before[..., top, left]
    area = (bottom - top).clamp(min=0) * (right - left).clamp(min=0)
    count = count.reshape(*before.shape[:2], *area.shape[-2:])
    area, inside = (z.expand(area.shape).reshape(area.shape[-2:]) for z in (area, inside))
    return Verdict.exact((count > 0) & (area > 0), (count == area) & (area > 0) & inside)
