"""What a comparison may say of its ranking: who is told apart from the best, and whether more steps may change it.

The best is told apart from another mechanism if all of these hold:

1. A paired t-test over the seeds that both finished gives p < 0.05, after Holm's correction for the number of
   mechanisms that the best is held against. A seed gives all mechanisms the same batches: its differences are paired.
2. Training is past the stage where steps decide more than the mechanism: what either's loss still falls with a doubling
   of the steps is less than the lead in training loss.
3. The lead lasts: if it shrinks, then so slowly that it is there at ten times the steps.

Both falls and leads are read off a line in log(steps) through the second half of the training curves, which are means
over seeds.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from regard.bench.report.groups import Group, Row

LEVEL = 0.05
HORIZON = 10
"""Times the steps that a lead must last."""
POINTS = 8
"""Points of a curve's second half that a line needs."""
MATTERS = 0.01
"""Share of the loss that a fall must be to matter."""
DOUBLING = math.log(2)

Curve = list[tuple[int, float]]
"""(step, loss)."""


@dataclass(frozen=True)
class Pair:
    """The best mechanism, held against another. Of losses, what is unknown is NaN."""

    lead: float
    """By how much the best is better on held-out data, in the mean over seeds."""
    p: float | None
    """Of the paired t-test, after Holm's correction; None with fewer than two seeds in common."""
    gap: float
    """By how much its training loss is lower at the end."""
    lasts: float
    """Times the steps at which that is gone at its pace; infinite if it does not shrink."""
    falls: float
    """By how much the training loss falls with a doubling of the steps, of the two that which falls more."""

    @property
    def carried(self) -> bool:
        """Whether the paired differences over seeds carry it."""
        return self.p is not None and self.p < LEVEL

    @property
    def apart(self) -> bool:
        """Whether the two are told apart."""
        return self.carried and self.lasts > HORIZON and self.gap > self.falls


@dataclass(frozen=True)
class Verdict:
    """Of a group with at least two ranked rows: the best one against each other."""

    best: Row
    pairs: list[tuple[Row, Pair]]
    """The others in their order."""
    falls: float
    """By how much the best's training loss falls with a doubling of the steps; NaN if unknown."""
    loss: float
    """Its training loss at the end."""

    @property
    def early(self) -> bool:
        """Whether steps decide more than the mechanism does."""
        return self.falls > max(MATTERS * self.loss, self.pairs[0][1].gap)

    def of(self, row: Row) -> Pair | None:
        return next((pair for other, pair in self.pairs if other is row), None)


def verdict(group: Group) -> Verdict | None:
    """What may be said of a group's ranking; None where fewer than two mechanisms are ranked."""
    if len(group.ranked) < 2:
        return None
    best, *others = group.ranked
    found = [held_against(group, best, other) for other in others]
    corrected = holm([pair.p for pair in found])
    pairs = [(other, replace(pair, p=p)) for other, pair, p in zip(others, found, corrected)]
    loss, pace = end_and_pace(best.curve())
    return Verdict(best, pairs, -DOUBLING * pace, loss)


def held_against(group: Group, best: Row, other: Row) -> Pair:
    """Two rows, with the p of their test alone."""
    mine, its = ({r.cell.seed: r for r in row.done if group.main in r.heldout} for row in (best, other))
    seeds = sorted(mine.keys() & its.keys())
    sign = group.metric.better
    leads = [sign * (mine[seed].heldout[group.main] - its[seed].heldout[group.main]) for seed in seeds]
    lead = abs(best.heldout[group.main].mean - other.heldout[group.main].mean)
    gap, pace = end_and_pace(difference([(mine[seed].curve, its[seed].curve) for seed in seeds]))
    lasts = 1.0 if gap <= 0 else math.inf if pace >= 0 else math.exp(min(gap / -pace, 700.0))
    falls = max(-DOUBLING * end_and_pace(row.curve())[1] for row in (best, other))
    return Pair(lead, paired_t(leads), gap, lasts if math.isfinite(gap) else math.nan, falls)


def paired_t(differences: Sequence[float]) -> float | None:
    """Two-sided p of a t-test of a mean of zero; None for fewer than two differences."""
    if len(differences) < 2:
        return None
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if not spread:
        return 0.0 if mean else 1.0
    return student(mean / (spread / math.sqrt(len(differences))), len(differences) - 1)


def student(t: float, freedom: int) -> float:
    """Two-sided tail of Student's t: Abramowitz and Stegun 1964, equations 26.7.3 and 26.7.4."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for n in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * n / (n + 1)
    inside = math.sin(angle) * total
    return 1 - ((angle + inside) * 2 / math.pi if odd else inside)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p values after Holm's correction for how many there are."""
    known = sorted((p, place) for place, p in enumerate(values) if p is not None)
    corrected, largest = list(values), 0.0
    for rank, (p, place) in enumerate(known):
        corrected[place] = largest = max(largest, min(1.0, p * (len(known) - rank)))
    return corrected


def difference(pairs: Sequence[tuple[Curve, Curve]]) -> Curve:
    """By how much the second curve of a pair is above the first, in the mean over pairs, where all have a point."""
    gaps = [
        {step: its[step] - mine[step] for step in mine.keys() & its.keys()}
        for mine, its in ((dict(first), dict(second)) for first, second in pairs)
    ]
    steps = sorted(set.intersection(*map(set, gaps))) if gaps else []
    return [(step, statistics.fmean(gap[step] for gap in gaps)) for step in steps]


def end_and_pace(curve: Curve) -> tuple[float, float]:
    """Of a line in log(steps) through a curve's second half: its end, and its slope for each e-fold of steps.

    NaN where the half has fewer than POINTS points.
    """
    late = [(step, value) for step, value in curve if step > curve[-1][0] / 2]
    if len(late) < POINTS:
        return math.nan, math.nan
    line = statistics.linear_regression([math.log(step / late[-1][0]) for step, _ in late], [v for _, v in late])
    return line.intercept, line.slope
