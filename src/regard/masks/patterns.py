"""The built-in masks that are made of numbers alone: equal numbers, equal masks."""

import math
import sys
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor

from regard.masks.algebra import Index, Mask
from regard.masks.checks import integer
from regard.masks.verdict import Tiles, Verdict


@dataclass(frozen=True, repr=False)
class Diagonals(Mask):
    """-ahead <= i - j <= back, and i - j a multiple of step."""

    back: int | float
    ahead: int | float
    step: int
    words: str = field(compare=False)

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        distance = i - j
        conditions = []
        if self.back != math.inf:
            conditions.append(distance <= self.back)
        if self.ahead != math.inf:
            conditions.append(distance >= -self.ahead)
        if self.step > 1 or not conditions:
            conditions.append(distance % self.step == 0)
        allowed = conditions[0]
        for condition in conditions[1:]:
            allowed = allowed & condition
        return allowed

    def judge(self, tiles: Tiles) -> Verdict:
        # A tile takes every distance between its two corners, so both answers are exact.
        low, high = tiles.i_lo - tiles.j_hi, tiles.i_hi - tiles.j_lo
        full = torch.ones_like(low, dtype=torch.bool)
        first, last = low, high
        if self.back != math.inf:
            full, last = full & (high <= self.back), last.clamp(max=int(self.back))
        if self.ahead != math.inf:
            full, first = full & (low >= -self.ahead), first.clamp(min=int(-self.ahead))
        some = last // self.step * self.step >= first
        if self.step > 1:
            full = full & (low == high) & (low % self.step == 0)
        return Verdict.exact(some, full)

    @property
    def span(self) -> tuple[int | float, int | float]:
        return self.back, self.ahead

    @property
    def is_shift_invariant(self) -> bool:
        return True

    def __repr__(self) -> str:
        return self.words


def full() -> Mask:
    """Everything may see everything."""
    return Diagonals(math.inf, math.inf, 1, "full()")


def nothing() -> Mask:
    """Nothing sees anything."""
    return Diagonals(-1, -1, 1, "nothing()")


def causal() -> Mask:
    """j <= i."""
    return _CAUSAL


_CAUSAL = Diagonals(math.inf, 0, 1, "causal()")
"""One for all, so that small calls need not compare."""


def window(size: int, *, ahead: int | None = None) -> Mask:
    """i - j < size and j - i < ahead (ahead = size unless given); both counts include the query's own key.

    `causal() & window(size)` sees exactly `size` keys.
    """
    integer("window: size", size)
    words = f"window({size})" if ahead is None else f"window({size}, ahead={ahead})"
    ahead = size if ahead is None else integer("window: ahead", ahead)
    return Diagonals(size - 1, ahead - 1, 1, words)


def dilated(size: int, dilation: int) -> Mask:
    """|i - j| < size * dilation, i - j a multiple of dilation: `size` keys a side, its own in both."""
    integer("dilated: size", size)
    integer("dilated: dilation", dilation)
    furthest = (size - 1) * dilation
    return Diagonals(furthest, furthest, dilation, f"dilated({size}, {dilation})")


def strided(stride: int) -> Mask:
    """i - j a multiple of stride."""
    return Diagonals(math.inf, math.inf, integer("strided: stride", stride), f"strided({stride})")


def offset(n: int) -> Mask:
    """j == i + n: every query sees one key, n tokens later (earlier where n < 0); those without one see nothing."""
    integer("offset: n", n, least=-sys.maxsize)
    return Diagonals(-n, n, 1, f"offset({n})")


@dataclass(frozen=True, repr=False)
class Blocks(Mask):
    """0 <= i // size - j // size <= before."""

    size: int
    before: int = 0

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        back = i // self.size - j // self.size
        return (back >= 0) & (back <= self.before) if self.before else back == 0

    def judge(self, tiles: Tiles) -> Verdict:
        # A tile takes every number of blocks between its two corners, so both answers are exact.
        low = tiles.i_lo // self.size - tiles.j_hi // self.size
        high = tiles.i_hi // self.size - tiles.j_lo // self.size
        return Verdict.exact((low <= self.before) & (high >= 0), (low >= 0) & (high <= self.before))

    @property
    def span(self) -> tuple[int | float, int | float]:
        return (self.before + 1) * self.size - 1, self.size - 1

    def __repr__(self) -> str:
        return f"blocks({self.size}, before={self.before})" if self.before else f"blocks({self.size})"


def blocks(size: int, *, before: int = 0) -> Mask:
    """0 <= i // size - j // size <= before: the sequence is cut into blocks that see themselves, and so many before.

    `causal() & blocks(size, before=1)` is blockwise causal attention (Sun et al. 2022, https://arxiv.org/abs/2212.10554,
    section 3.3): a query sees between size + 1 and 2 size keys, but in the first block.
    """
    return Blocks(integer("blocks: size", size), integer("blocks: before", before, least=0))


@dataclass(frozen=True, repr=False)
class NearBlocks(Mask):
    """|i // size - j // size| <= near."""

    size: int
    near: int

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        return (i // self.size - j // self.size).abs() <= self.near

    def judge(self, tiles: Tiles) -> Verdict:
        # A tile takes every distance of blocks between its two corners, so both answers are exact.
        low, high = tiles.i_lo // self.size - tiles.j_hi // self.size, tiles.i_hi // self.size - tiles.j_lo // self.size
        some = (low <= self.near) & (high >= -self.near)
        return Verdict.exact(some, (low >= -self.near) & (high <= self.near))

    @property
    def span(self) -> tuple[int | float, int | float]:
        furthest = (self.near + 1) * self.size - 1
        return furthest, furthest

    def __repr__(self) -> str:
        return f"near_blocks({self.size}, {self.near})"


def near_blocks(size: int, near: int = 1) -> Mask:
    """|i // size - j // size| <= near: blocks that see themselves, and `near` blocks on each side."""
    return NearBlocks(integer("near_blocks: size", size), integer("near_blocks: near", near, least=0))


@dataclass(frozen=True, repr=False)
class GlobalTokens(Mask):
    """i < n or j < n."""

    n: int

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        return (i < self.n) | (j < self.n)

    def judge(self, tiles: Tiles) -> Verdict:
        some = (tiles.i_lo < self.n) | (tiles.j_lo < self.n)
        return Verdict.exact(some, (tiles.i_hi < self.n) | (tiles.j_hi < self.n))

    def __repr__(self) -> str:
        return f"global_tokens({self.n})"


@dataclass(frozen=True, repr=False)
class Prefix(Mask):
    """j < n."""

    n: int

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        return j < self.n

    def judge(self, tiles: Tiles) -> Verdict:
        return Verdict.exact(tiles.j_lo < self.n, tiles.j_hi < self.n)

    def __repr__(self) -> str:
        return f"prefix({self.n})"
