"""Masks of single keys: lists of those that runs of queries chose, and keys that go out of sight for good."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.checks import refuse
from regard.masks import checks
from regard.masks.algebra import Index, Mask
from regard.masks.verdict import Tiles, Verdict


@dataclass(frozen=True, eq=False, repr=False)
class Listed(Mask):
    """j is one of keys[b, h, t // run], where t = i - (S - T) counts the queries; negative ones are none."""

    keys: Int[Tensor, "B H n k"]
    T: int
    S: int
    run: int

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        (B, H, n, k), t = self.keys.shape, i - (self.S - self.T)
        inside = (t >= 0) & (t < self.T) & (j >= 0) & (j < self.S)
        if n == 0 or k == 0:
            return inside & False
        held = self.keys.to(j.device)[b if B > 1 else 0, h if H > 1 else 0, (t // self.run).clamp(0, n - 1)]
        if i.dim() and i.shape[-1] == 1 and j.dim() and (j.dim() < 2 or j.shape[-2] == 1):
            # Rows against columns, as kernels ask: whole rows are written.
            held = held.squeeze(-2).long()
            rows = torch.zeros(*held.shape[:-1], self.S + 1, dtype=torch.bool, device=j.device)
            rows = rows.scatter(-1, torch.where((held >= 0) & (held < self.S), held, self.S), True)
            column = j.clamp(0, self.S).expand(*rows.shape[:-1], j.shape[-1])
            return rows.gather(-1, column) & inside
        found = held[..., 0] == j
        for one in held.unbind(-1)[1:]:
            found = found | (one == j)
        return found & inside

    def judge(self, tiles: Tiles) -> Verdict:
        low, high = tiles.j_lo.flatten(), tiles.j_hi.flatten()
        first, last = (z.flatten() - (self.S - self.T) for z in (tiles.i_lo, tiles.i_hi))
        (B, H, n, k), r, c = self.keys.shape, len(first), len(low)
        ordered = all(bool((z[1:] > y[:-1]).all()) for z, y in ((low, high), (first, last)))
        if not ordered or not n or not k or not r or not c:
            return Verdict.unknown(tiles)
        # How many entries of each run's list lie in each column of tiles; a run that crosses two rows counts in both.
        runs = torch.arange(n, device="cpu")
        top = torch.searchsorted(last, runs * self.run)
        bottom = torch.searchsorted(first, ((runs + 1) * self.run).clamp(max=self.T) - 1, right=True) - 1
        some = (top <= bottom).nonzero().flatten()
        held = self.keys.cpu()[:, :, some].long()
        column = torch.searchsorted(low, held, right=True) - 1
        real = (column >= 0) & (held <= high[column.clamp(min=0)]) & (held >= 0) & (held < self.S)
        count = torch.zeros(B, H, len(some), c + 1, dtype=torch.int32, device="cpu")
        count.scatter_add_(3, torch.where(real, column, c), torch.ones_like(column, dtype=torch.int32))
        count = count[..., :c]
        # An entry may be there twice, or its queries not all in the tile: only what nothing reaches is known for sure.
        may = torch.zeros(B, H, r + 1, c, dtype=torch.int32, device="cpu")
        wide = int((bottom - top)[some].max()) + 1 if len(some) else 0
        for ahead in range(wide):
            row = torch.where(top[some] + ahead <= bottom[some], top[some] + ahead, r)
            may.index_add_(2, row, (count > 0).int())
        hit, none = may[:, :, :r] > 0, torch.zeros_like(may[:, :, :r], dtype=torch.bool)
        return Verdict(hit, hit, none, hit)

    @property
    def batch(self) -> int:
        return self.keys.shape[0]

    @property
    def heads(self) -> int:
        return self.keys.shape[1]

    def to(self, device: torch.device | str) -> Mask:
        same = self.keys.device == torch.device(device)
        return self if same else Listed(self.keys.to(device), self.T, self.S, self.run)

    def __repr__(self) -> str:
        return f"listed(<{'x'.join(map(str, self.keys.shape))}>, run={self.run})"


def listed(keys: Int[Tensor, "#B #H n k"], T: int, S: int, *, run: int = 1) -> Mask:
    """Each run of so many queries sees the keys of its list, in any order; -1 fills lists that have fewer.

    The last T of S positions are the queries; the last run may be short.
    """
    T, S = checks.lengths("listed", T, S)
    n = -(-T // checks.integer("listed: run", run))
    if checks.tensor("listed: keys", keys, (4,), "integer").shape[2] != n:
        refuse("listed", "keys", "has the wrong shape", tuple(keys.shape), f"(B, H, {n}, k) for T={T}, run={run}")
    return Listed(keys, T, S, run)


@dataclass(frozen=True, eq=False, repr=False)
class Lasting(Mask):
    """i < until[b, h, j]: a key is there until somebody takes its place."""

    until: Int[Tensor, "B H S"]

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        (B, H, S), until = self.until.shape, self.until.to(j.device)
        if S == 0:
            return (i != i) & (j != j)
        at = j.clamp(0, S - 1)
        return (i < until[b if B > 1 else 0, h if H > 1 else 0, at]) & (at == j)

    def judge(self, tiles: Tiles) -> Verdict:
        S, (low, high) = self.until.shape[2], (z.flatten() for z in (tiles.j_lo, tiles.j_hi))
        if S == 0 or not len(low):
            return Verdict.unknown(tiles)
        offsets = torch.arange(int((high - low).max()) + 1, device="cpu")
        until = self.until.cpu()[:, :, torch.minimum(low[:, None] + offsets, high[:, None]).clamp(0, S - 1)]
        longest, shortest = until.amax(-1)[:, :, None], until.amin(-1)[:, :, None]
        return Verdict.exact(tiles.i_lo < longest, tiles.i_hi < shortest)

    @property
    def batch(self) -> int:
        return self.until.shape[0]

    @property
    def heads(self) -> int:
        return self.until.shape[1]

    def to(self, device: torch.device | str) -> Mask:
        return self if self.until.device == torch.device(device) else Lasting(self.until.to(device))

    def __repr__(self) -> str:
        return f"lasting(<{'x'.join(map(str, self.until.shape))}>)"
