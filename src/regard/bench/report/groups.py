"""Results brought together: a group a task, in it a row a mechanism, in it statistics over seeds."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from regard.bench.record import Result
from regard.bench.report.settings import as_text, differing
from regard.tasks import Metric

MEASURES: dict[str, tuple[str, str, int]] = {
    "train_tokens_per_second": ("Train", "tok/s", 1),
    "generate_tokens_per_second": ("Generate", "tok/s", 1),
    "peak_memory_bytes": ("Peak memory", "B", -1),
    "state_bytes": ("State", "B", -1),
    "parameters": ("Parameters", "", 0),
    "mlp_dim": ("MLP width", "", 0),
    "flops_per_token": ("FLOP per token", "", -1),
}
"""Field of a result -> its heading in the table, unit, whether more is better (1), less (-1) or neither."""
SPREADS = {"train_tokens_per_second": "train_spread", "generate_tokens_per_second": "generate_spread"}
"""Of what is measured in rounds, the field that holds its spread over them."""


@dataclass(frozen=True)
class Stat:
    """A mean over seeds with its sample standard deviation (None with fewer than two seeds), or as SPREADS says."""

    mean: float
    spread: float | None
    count: int

    @property
    def finite(self) -> bool:
        return math.isfinite(self.mean)

    @property
    def ends(self) -> list[float]:
        """One spread below the mean and one above."""
        return [self.mean - (self.spread or 0), self.mean + (self.spread or 0)]


def _stat(values: Iterable[float]) -> Stat | None:
    found = [float(v) for v in values]
    if not found:
        return None
    if not all(map(math.isfinite, found)):
        return Stat(math.nan, None, len(found))
    return Stat(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


def undecided(best: Stat, other: Stat) -> bool:
    """Whether two means lie within the larger of their spreads, as far as one seed lets that be known."""
    return abs(other.mean - best.mean) <= max(best.spread or 0, other.spread or 0)


@dataclass
class Row:
    """All seeds of one mechanism under one set of settings."""

    label: str
    mechanism: str
    done: list[Result]
    failed: list[Result]
    index: int = 0
    """Its place in the whole report, which decides its colour, dash and marker."""
    heldout: dict[str, Stat] = field(default_factory=dict)
    """What the task measures, by label."""
    measures: dict[str, Stat] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for label in {label for r in self.done for label in r.heldout}:
            stat = _stat(r.heldout[label] for r in self.done if label in r.heldout)
            if stat is not None:
                self.heldout[label] = stat
        for name in MEASURES:
            stat = _stat(value for r in self.done if (value := getattr(r, name)) > 0)
            if stat is not None and stat.finite:
                self.measures[name] = stat
        for name, spread in SPREADS.items():
            if name in self.measures:  # the same number at each seed: it was measured once, in rounds
                self.measures[name] = replace(self.measures[name], spread=max(getattr(r, spread) for r in self.done))

    def curve(self) -> list[tuple[int, float]]:
        """The mean training loss at the steps that every seed recorded."""
        curves = [dict(r.curve) for r in self.done if r.curve]
        steps = sorted(set.intersection(*(set(c) for c in curves))) if curves else []
        return [(step, statistics.fmean(c[step] for c in curves)) for step in steps]


@dataclass
class Group:
    """The rows of one task, best first; those without a finite number come last."""

    task: str
    metric: Metric
    rows: list[Row]
    labels: list[str]
    """Of what was measured on held-out data; the main one first, if it was."""
    main: str
    """The label that ranks: the metric's own wherever it was measured."""
    results: list[Result] = field(default_factory=list)
    apart: str = ""
    """What tells it from the other groups of its task: 'steps=5, data=book.txt'; '' for the only one."""

    @property
    def title(self) -> str:
        """'text' or 'text, steps=5'."""
        return ", ".join(filter(None, (self.task, self.apart)))

    @property
    def ranked(self) -> list[Row]:
        return [r for r in self.rows if self.main in r.heldout and r.heldout[self.main].finite]

    def best(self, label: str) -> Stat | None:
        """The best mean that any row has there."""
        found = [row.heldout[label] for row in self.rows if label in row.heldout and row.heldout[label].finite]
        return max(found, key=lambda stat: self.metric.better * stat.mean, default=None)


def grouped(results: Sequence[Result]) -> list[Group]:
    """The latest result of every cell, by task and all settings that decide what is learnt from what.

    Only numbers of one group are held against each other: another text, or more steps, is another question.
    """
    latest = {r.cell.key: r for r in results}.values()
    groups, index = [], 0
    asked: dict[str, list[Result]] = {}
    for r in latest:
        asked.setdefault(_question(r), []).append(r)
    tasks = list(dict.fromkeys(r.cell.task for r in latest))
    for mine in sorted(asked.values(), key=lambda some: tasks.index(some[0].cell.task)):
        task = mine[0].cell.task
        rows, metric = _rows(mine), next((r.metric for r in mine if r.status == "done"), Metric())
        found = {label for row in rows for label in row.heldout}
        labels = sorted(found, key=lambda label: (label != metric.main, factor(label)))
        main = metric.main if metric.main in labels or not labels else labels[0]
        rows.sort(key=lambda row: _order(row, main, metric.better))
        for row in rows:
            row.index, index = index, index + 1
        groups.append(Group(task, metric, rows, labels, main, mine))
    for task in tasks:
        _tell_apart([group for group in groups if group.task == task])
    return groups


ASIDE = ("code", "processor", "threads", "torch")
"""Settings that change no question: they tell how it was answered, and rows that differ in them say so."""


def _question(r: Result) -> str:
    settings = {name: value for name, value in r.cell.settings.items() if name not in ASIDE}
    return json.dumps([r.cell.task, settings], sort_keys=True)


def _tell_apart(groups: Sequence[Group]) -> None:
    """Give each what its settings alone have; hashes and sizes only where nothing that people read differs."""
    settings = [group.results[0].cell.settings for group in groups]
    keys = [key for key in differing(settings) if key not in ASIDE]
    keys = [key for key in keys if key not in ("bytes", "fingerprint")] or keys
    for group, its in zip(groups, settings):
        group.apart = ", ".join(f"{key}={as_text(its.get(key))}" for key in keys)


def _rows(results: Sequence[Result]) -> list[Row]:
    """A row a mechanism and settings, as a mean must not mix settings."""
    variants: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        same = (r.cell.mechanism, json.dumps(r.cell.settings, sort_keys=True))
        variants.setdefault(same, []).append(r)
    rows = []
    for (mechanism, _), members in variants.items():
        # Where a mechanism ran under several settings, its label says what differs.
        keys = differing([m[0].cell.settings for (name, _), m in variants.items() if name == mechanism])
        settings = members[0].cell.settings
        label = " · ".join([mechanism, *(f"{key}={as_text(settings.get(key))}" for key in keys)])
        done = [r for r in members if r.status == "done"]
        rows.append(Row(label, mechanism, done, [r for r in members if r.status != "done"]))
    return rows


def factor(label: str) -> tuple[float, str]:
    """The order of labels: '1x', '2x', '16x', or '4', '8', '16'; then what is no number."""
    try:
        return float(label.rstrip("x%")), label
    except ValueError:
        return math.inf, label


def _order(row: Row, main: str, better: int) -> tuple[int, float]:
    """The best first; then those that diverged; then those that failed."""
    stat = row.heldout.get(main)
    if stat is not None and stat.finite:
        return 0, -better * stat.mean
    return (1 if row.done else 2), 0.0
