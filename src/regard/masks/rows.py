"""A mask seen from some of its rows: what every so many queries may see, when they are computed by themselves."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.masks.algebra import And, Index, Mask
from regard.masks.patterns import causal, full
from regard.masks.tensors import Kept, Lengths
from regard.masks.verdict import Tiles, Verdict


@dataclass(frozen=True, repr=False)
class EveryRow(Mask):
    """mask(b, h, i * step + shift, j)."""

    part: Mask
    step: int
    shift: int

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        return self.part(b, h, i * self.step + self.shift, j)

    def judge(self, tiles: Tiles) -> Verdict:
        # Of the rows in between nothing is asked: what holds for all of them or for none holds for these.
        low, high = (i * self.step + self.shift for i in (tiles.i_lo, tiles.i_hi))
        all_rows = self.part.judge(Tiles(low, high, tiles.j_lo, tiles.j_hi))
        ends = [self.part.judge(Tiles(i, i, tiles.j_lo, tiles.j_hi)) for i in (low, high)]
        some = all_rows.full | ends[0].some | ends[1].some
        return Verdict(some, all_rows.may, all_rows.full, ends[0].may_full & ends[1].may_full)

    @property
    def batch(self) -> int:
        return self.part.batch

    @property
    def heads(self) -> int:
        return self.part.heads

    def to(self, device: torch.device | str) -> Mask:
        return EveryRow(self.part.to(device), self.step, self.shift)

    def __repr__(self) -> str:
        return f"every_row({self.part!r}, {self.step}, {self.shift})"


def every_row(mask: Mask, step: int, *, T: int, S: int, count: int) -> Mask:
    """Of T queries against S keys the first `count` that stand `step` apart, from the first query on, as the mask of
    `count` queries against S keys."""
    first = S - T
    return EveryRow(mask, step, first - step * (S - count))


def sees_any(mask: Mask, i: Int[Tensor, " t"], S: int) -> Bool[Tensor, "#B #H t"] | None:
    """Whether queries at `i` may see a key at all. None: all do. In chunks where padding is not all that hides keys."""
    parts = mask.parts if isinstance(mask, And) else (mask,)
    j, padded = torch.arange(S, device=i.device), [part for part in parts if isinstance(part, Kept | Lengths)]
    others = [part for part in parts if part not in padded and part != full()]
    if all(part == causal() for part in others):
        if not padded:
            return None
        keep = torch.stack([part.at(i[-1:], j)[:, :, 0].expand(mask.batch, 1, S) for part in padded]).all(0)
        return keep.cumsum(-1)[..., i.clamp(min=0)] > 0 if others else keep.any(-1, keepdim=True).expand(-1, 1, len(i))
    return torch.cat([mask.at(rows, j).any(-1) for rows in i.split(256)], -1)
