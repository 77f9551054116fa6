"""Several sequences end to end, with other numbers of queries than of keys: each as if by itself."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.masks.algebra import Index, Mask
from regard.masks.patterns import Diagonals
from regard.masks.verdict import Tiles, Verdict


@dataclass(frozen=True, eq=False, repr=False)
class Varlen(Mask):
    """Query t sees keys first[t] .. last[t], the ones of its own sequence, as far as `rule` allows it there."""

    rule: Mask
    first: Int[Tensor, " T"]
    last: Int[Tensor, " T"]
    """Like `first` it never falls; less than `first` for a query that sees nothing."""
    start: Int[Tensor, " T"]
    """The first key of the query's sequence."""
    place: Int[Tensor, " T"]
    """Where the query stands in its sequence, as the last queries of its keys."""
    keys: int

    @classmethod
    def of(cls, cu_q: list[int], cu_k: list[int], T: int, S: int, rule: Mask, device: torch.device) -> "Varlen":
        """From cumulative lengths; queries behind the last sequence see nothing."""
        counts = torch.tensor([*cu_q, T], device=device).diff()
        number = torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=T)
        begin, (start, end) = (
            torch.tensor(cu_q, device=device),
            torch.tensor([[*cu_k[:-1], S], [*cu_k[1:], S]], device=device),
        )
        shift = end - start - counts  # bottom-right: a sequence's last query stands where its last key stands
        place = torch.arange(T, device=device) + (shift - begin)[number]
        start, end = start[number], end[number]
        back, ahead = rule.span
        first = start if back == torch.inf else torch.maximum(start, start + place - int(back))
        last = end - 1 if ahead == torch.inf else torch.minimum(end - 1, start + place + int(ahead))
        return cls(rule, first, torch.maximum(last, start - 1), start, place, S)

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        T = len(self.place)
        if T == 0:
            return (i != i) | (j != j)
        t = i - (self.keys - T)
        row = t.clamp(0, T - 1)
        seen = (self.first[row] <= j) & (j <= self.last[row]) & (t == row)
        return seen if self._exact else seen & self.rule(b, h, self.place[row], j - self.start[row])

    def judge(self, tiles: Tiles) -> Verdict:
        T, offset = len(self.place), self.keys - len(self.place)
        if T == 0:
            never = torch.zeros_like(tiles.i_lo + tiles.j_lo, dtype=torch.bool)
            return Verdict.exact(never, never)
        low, high = (z - offset for z in (tiles.i_lo, tiles.i_hi))
        inside, touches = (low >= 0) & (high < T), (high >= 0) & (low < T)
        low, high = low.clamp(0, T - 1), high.clamp(0, T - 1)
        may = touches & (self.first[low] <= tiles.j_hi) & (self.last[high] >= tiles.j_lo)
        full = inside & (self.first[high] <= tiles.j_lo) & (self.last[low] >= tiles.j_hi)
        if not self._exact:
            never = torch.zeros_like(may)
            return Verdict(never, may, never, full)
        some = torch.zeros_like(may)
        for row in (low, high):  # rows between may see no key that these two don't
            some = some | (torch.maximum(self.first[row], tiles.j_lo) <= torch.minimum(self.last[row], tiles.j_hi))
        return Verdict(touches & some, may, full, full)

    @property
    def _exact(self) -> bool:
        """Whether the rule is a band, of which `first` and `last` tell all."""
        return isinstance(self.rule, Diagonals) and self.rule.step == 1

    @property
    def heads(self) -> int:
        return self.rule.heads

    def to(self, device: torch.device | str) -> Mask:
        if self.first.device == torch.device(device):
            return self
        moved = {name: getattr(self, name).to(device) for name in ("first", "last", "start", "place")}
        return replace(self, rule=self.rule.to(device), **moved)

    def __repr__(self) -> str:
        return f"varlen({len(self.place)} queries, {self.keys} keys, {self.rule!r})"
