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
