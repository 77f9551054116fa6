"""Patterns in which heads cut one sequence differently: chunks whose keys are shifted, shifted groups, windows of many
sizes, and keys of one residue. Each head's tiles are judged exactly, from numbers alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from regard.checks import divides, refuse, whole
from regard.masks.algebra import Index, Mask
from regard.masks.patterns import Prefix, blocks, causal, full
from regard.masks.tensors import per_head
from regard.masks.verdict import Tiles, Verdict


@dataclass(frozen=True, repr=False)
class ShiftedBlocks(Mask):
    """(i + query) // size == (j + key) // size."""

    size: int
    query: int
    key: int

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        return (i + self.query) // self.size == (j + self.key) // self.size

    def judge(self, tiles: Tiles) -> Verdict:
        first_i, last_i = (tiles.i_lo + self.query) // self.size, (tiles.i_hi + self.query) // self.size
        first_j, last_j = (tiles.j_lo + self.key) // self.size, (tiles.j_hi + self.key) // self.size
        some = (first_i <= last_j) & (first_j <= last_i)
        return Verdict.exact(some, some & (first_i == last_i) & (first_j == last_j))

    @property
    def span(self) -> tuple[int | float, int | float]:
        ahead = self.query - self.key
        return self.size - 1 - ahead, self.size - 1 + ahead

    def __repr__(self) -> str:
        return f"shifted_blocks({self.size}, {self.query}, {self.key})"


@dataclass(frozen=True, repr=False)
class Residue(Mask):
    """j % step == offset."""

    step: int
    offset: int

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        return j % self.step == self.offset

    def judge(self, tiles: Tiles) -> Verdict:
        low, high = tiles.j_lo - self.offset, tiles.j_hi - self.offset
        count = high // self.step - (low - 1) // self.step
        return Verdict.exact(count > 0, count == high - low + 1)

    def __repr__(self) -> str:
        return f"residue({self.step}, {self.offset})"


def shifted_chunks(chunk: int, shifts: Sequence[int], *, wrap: int | None = None) -> Mask:
    """Of each head: i // chunk == (j + shift) // chunk, so that a query in chunk c sees the `chunk` keys from
    c * chunk - shift on. A shift of at least `chunk` leaves a query's own chunk out.

    Args:
        shifts: one >= 0 for each head.
        wrap: how many tokens there are, a multiple of `chunk`: keys before the first are taken from the end. Default:
            there are none.
    """
    whole("shifted_chunks", chunk=chunk)
    _each("shifted_chunks", 0, shifts=shifts)
    if wrap is None:
        return per_head([_alike(chunk, 0, shift) for shift in shifts])
    _wraps("shifted_chunks", wrap, chunk=chunk)
    shifts = [shift % wrap for shift in shifts]
    return per_head([_alike(chunk, 0, s) | _alike(chunk, 0, s - wrap) if s else blocks(chunk) for s in shifts])


def shifted_dilated(segment: int, dilation: int, offsets: Sequence[int]) -> Mask:
    """Of each head: i // segment == j // segment, and j - offset a multiple of `dilation`: every query of a segment
    sees the same keys of it, and heads with other offsets see others.

    Args:
        offsets: one >= 0 for each head.
    """
    whole("shifted_dilated", segment=segment, dilation=dilation)
    _each("shifted_dilated", 0, offsets=offsets)
    return per_head([blocks(segment) & Residue(dilation, offset % dilation) for offset in offsets])


def shifted_groups(
    group: int, heads: int, *, shifted: int | None = None, sinks: int = 0, wrap: int | None = None
) -> Mask:
    """Groups of `group` tokens that see only themselves; those of the last `shifted` heads begin group // 2 tokens
    later, and leave a short one before them. All see the first `sinks` keys. Add `& causal()` for text.

    Args:
        shifted: default heads // 2.
        wrap: how many tokens there are, a multiple of `group`: the first, short group joins the last one, behind it.
            The mask is then causal, in the order that groups have: the first tokens see the last ones.
    """
    whole("shifted_groups", group=group, heads=heads)
    whole("shifted_groups", 0, sinks=sinks)
    shifted = heads // 2 if shifted is None else shifted
    whole("shifted_groups", 0, most=heads, shifted=shifted)
    by = group // 2
    there = _alike(group, -by, -by) if by else blocks(group)
    here = blocks(group)
    if wrap is not None:
        _wraps("shifted_groups", wrap, group=group)
        here, there = here & causal(), there & causal()
        if by:
            there = there | ShiftedBlocks(group, wrap - by, -by)
    mask = per_head([here] * (heads - shifted) + [there] * shifted)
    if not sinks:
        return mask
    return mask | Prefix(sinks) if wrap is None else mask | (Prefix(sinks) & causal())


def multi_window(windows: Sequence[int], *, shift: bool = False) -> Mask:
    """Of each head: windows of so many tokens that see only themselves, the last one may be shorter; 0 sees all.

    Args:
        windows: one >= 0 for each head.
        shift: windows begin half their size later, and what stands before the first is one by itself.
    """
    _each("multi_window", 0, windows=windows)
    halves = [w // 2 if shift else 0 for w in windows]
    cut = [_alike(w, -s, -s) if s else blocks(w) if w else full() for w, s in zip(windows, halves, strict=True)]
    return per_head(cut)


def _alike(size: int, query: int, key: int) -> Mask:
    return ShiftedBlocks(size, query, key) if query or key else blocks(size)


def _each(who: str, least: int, **values: Sequence[int]) -> None:
    """Refuse what is no sequence of ints >= least, one for each head."""
    for name, given in values.items():
        if isinstance(given, str) or not isinstance(given, Sequence) or len(given) == 0:
            refuse(who, name, "are not one for each head", repr(given), "a sequence of ints", error=TypeError)
        for value in given:
            whole(who, least, **{name: value})


def _wraps(who: str, wrap: int, **size: int) -> None:
    whole(who, wrap=wrap)
    divides(who, **size, wrap=wrap)
