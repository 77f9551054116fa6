"""What a swap did while the model ran: for each layer, how much of its attention was left, and how much of its mass."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.kernels import Problem
from regard.kernels.problem import biased_scores, rectangle
from regard.masks import Mask

PAIRS = 2**22
"""Scores, or mask entries, formed together."""


@dataclass
class Row:
    """One layer's counts."""

    layer: str
    calls: int = 0
    dense: int = 0
    """Calls that were computed in full, as the selector can't judge a single query."""
    pairs: list[int] = field(default_factory=lambda: [0, 0])
    """Kept, and allowed by the model's own mask."""
    mass: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Attention kept, and the queries it was measured for."""

    @property
    def density(self) -> float:
        """The share of the pairs that the model's mask allows, that was kept; NaN before the first call."""
        return self.pairs[0] / self.pairs[1] if self.pairs[1] else math.nan

    @property
    def kept_mass(self) -> float:
        """The share of exact attention that falls on kept pairs, mean over queries; NaN where it was not measured."""
        return self.mass[0] / self.mass[1] if self.mass[1] else math.nan


@dataclass(frozen=True)
class Report:
    """A table; print it."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        head = ("layer", "calls", "dense", "density", "kept mass")
        body = [(r.layer, str(r.calls), str(r.dense), _percent(r.density), _percent(r.kept_mass)) for r in self.rows]
        lines = [head, *body]
        widths = [max(len(line[n]) for line in lines) for n in range(5)]
        cells = [[c.ljust(w) if n == 0 else c.rjust(w) for n, (c, w) in enumerate(zip(x, widths))] for x in lines]
        return "\n".join("  ".join(line).rstrip() for line in cells)

    def __rich__(self) -> str:
        return str(self)


@torch.no_grad()
def count(row: Row, exact: Problem, kept: Problem, *, mass: bool) -> None:
    """Add one call: `exact` is the model's own attention, `kept` the same with fewer pairs."""
    row.calls += 1
    row.pairs[0] += _pairs(kept)
    row.pairs[1] += _pairs(exact)
    if mass:
        share, queries = _mass(exact, kept.mask)
        row.mass[0] += share
        row.mass[1] += queries


def _pairs(p: Problem) -> int:
    """Allowed (batch, head, query, key) entries."""
    B, H, _, T, S = p.shape
    if p.mask is None:
        return B * H * T * S
    copies = (B // p.mask.batch) * (H // p.mask.heads)
    if p.first_key or T * S * p.mask.batch * p.mask.heads <= PAIRS:
        return int(p.mask.at(p.i, p.j).sum()) * copies
    return p.mask.count(T, S) * copies


def _mass(p: Problem, kept: Mask | None) -> tuple[float, int]:
    """Attention on kept pairs, summed over the queries that see anything, and how many these are."""
    B, H, _, T, S = p.shape
    total, seen = 0.0, 0
    for rows in torch.arange(T).split(max(1, PAIRS // max(1, B * H * S))):
        at = slice(int(rows[0]), int(rows[-1]) + 1)
        part = rectangle(p, at, slice(0, S))
        scores = biased_scores(p, part, at, slice(0, S))
        all_, some = (_lse(scores, mask, p, at) for mask in (p.mask, kept))
        alive = all_ != -math.inf
        share = (some - torch.where(alive, all_, 0.0)).exp().masked_fill(~alive, 0.0)
        total, seen = total + float(share.sum()), seen + int(alive.sum())
    return total, seen


def _lse(scores: Tensor, mask: Mask | None, p: Problem, at: slice) -> Tensor:
    scores = scores if mask is None else scores.masked_fill(~mask.at(p.i[at], p.j), -math.inf)
    return scores.double().logsumexp(-1)


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{share:.1%}"
