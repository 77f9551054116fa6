"""What a comparison shows in a terminal: progress while it runs, and a table at its end."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from regard import terminal
from regard.bench.config import CompareConfig
from regard.bench.events import Event, Finished, Outcome, Planned, Started, Stepped
from regard.bench.record import Cell, Result
from regard.tasks import Metric


class Live:
    """Call it with every event. In a terminal it draws two bars; elsewhere it prints a line a cell."""

    def __init__(self, config: CompareConfig, console: Console | None = None):
        self.config, self.console = config, console or terminal.console()
        if console is None and not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = 100
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
        self._stack = ExitStack()
        self._drawn = 0.0

    def __enter__(self) -> "Live":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __call__(self, event: Event) -> None:
        match event:
            case Planned():
                self._plan(event)
            case Started():
                self._bars.reset(self._cell, total=self._steps, description=label(event.cell), note="starting")
            case Stepped() if time.monotonic() - self._drawn > 0.1 or event.step == self._steps:
                self._drawn = time.monotonic()
                note = f"{event.loss:.3f} {self._unit}" if event.step < self._steps else "measuring"
                self._bars.update(self._cell, completed=event.step, note=note)
            case Finished():
                self._bars.advance(self._all)
                self._say(f"[{event.number:>{self._digits}}/{self._total}] {line(event.result)}")

    def _plan(self, event: Planned) -> None:
        self._total, self._digits = len(event.cells), len(str(len(event.cells)))
        mechanisms = len({cell.mechanism for cell in event.cells})
        seeds = len({cell.seed for cell in event.cells})
        task, settings = event.cells[0].task, event.cells[0].settings
        self._steps, self._unit = settings["steps"], event.metric.loss.split()[0]
        size = f" ({settings['bytes'] / 1e6:.3g} MB)" if "bytes" in settings else ""
        length = f" x {settings['length']}{' bytes' * (task == 'text')}" if "length" in settings else ""
        self._say(
            f"{plural(mechanisms, 'mechanism')} x {plural(seeds, 'seed')}, {settings['steps']} steps of "
            f"{settings['batch']}{length}, equal {settings['match']}; {task}: {settings['data']}{size}"
        )
        for told in event.data:
            self._say(told)
        for reason, names in _alike(event.unfit).items():
            self._say(f"left out: {', '.join(names)}: {reason}")
        for said in event.named:
            self._say(f"note: {said}")
        if event.reused:
            self._say(f"{len(event.reused)} of {self._total} cells are in {Path(self.config.out)} already")
        if event.others:
            why = ", ".join(event.differing) or "mechanisms or seeds"
            self._say(f"{plural(event.others, 'earlier cell')} there with other {why}: kept, not used")
        self._all = self._bars.add_task("all cells", total=self._total, completed=len(event.reused), note="")
        self._cell = self._bars.add_task("", total=self._steps, note="")
        if self.console.is_terminal and len(event.reused) < self._total:
            self._stack.enter_context(self._bars)

    def _say(self, text: str) -> None:
        for part in terminal.wrapped(terminal.line(text), hang=2, within=self.console.width):
            self.console.print(part, markup=False, highlight=False, soft_wrap=True)


def _alike(unfit: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason -> the mechanisms that it keeps out."""
    found: dict[str, list[str]] = {}
    for name, reason in unfit.items():
        found.setdefault(reason, []).append(name)
    return found


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def label(cell: Cell) -> str:
    return f"{cell.mechanism} seed {cell.seed}"


def line(result: Result) -> str:
    """One finished cell in one line."""
    if result.status == "failed":
        return f"{label(result.cell)}: {'REFUSED' if result.refused else 'FAILED'}: {result.reason}"
    metric = result.metric
    return (
        f"{label(result.cell)}: {metric.write(result.heldout[metric.main])} {metric.name}, "
        f"{si(result.train_tokens_per_second)} tokens/s, {result.seconds:.0f} s"
    )


def si(value: float) -> str:
    """Three digits with a prefix: 51.7k."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{prefix}" if value < 999.5 * size else f"{value / size:.0f}{prefix}"
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


@dataclass(frozen=True)
class Column:
    heading: str
    value: Callable[[Result], float | None]
    write: Callable[[float], str]
    better: int
    """1: more is better, -1: less is, 0: neither."""
    rank: int
    """Those of higher rank are left out first where there is no room; 0 stays."""
    spread: Callable[[float], str] | None = None
    """How a standard deviation over seeds is written, where it is shown."""


def _columns(results: Sequence[Result]) -> list[Column]:
    """What the task measures, then what everything costs; the first ranks."""
    metric = next((r.metric for r in results if r.status == "done"), Metric())
    labels = list(dict.fromkeys([metric.main, *(label for r in results for label in r.heldout)]))
    columns = [
        Column(
            metric.title(label),
            partial(_heldout, label),
            metric.write,
            metric.better,
            3 * (label != metric.main),
            _spread(metric),
        )
        for label in labels
    ]
    return columns + [
        Column("train tok/s", lambda r: r.train_tokens_per_second, si, 1, 1),
        Column("gen tok/s", lambda r: r.generate_tokens_per_second or None, si, 1, 5),
        Column("peak MB", lambda r: r.peak_memory_bytes / 1e6, "{:.0f}".format, -1, 2),
        Column("state KB", lambda r: r.state_bytes / 1e3 or None, "{:.1f}".format, -1, 6),
        Column("params", lambda r: r.parameters, si, 0, 4),
    ]


def _heldout(label: str, result: Result) -> float | None:
    return result.heldout.get(label)


def _spread(metric: Metric) -> Callable[[float], str]:
    """A standard deviation in a few characters: '±.012', or '±1.2' of percents."""
    return lambda value: f"±{100 * value:.1f}" if metric.percent else f"±{value:.3f}".replace("±0.", "±.")


def table(results: Sequence[Result], within: int | None = None) -> Text:
    """One row a mechanism, the best on held-out data first; the best of a column is bold with a star.

    ± is the standard deviation over seeds. What has no room is left out, the main number and speed last.
    """
    done: dict[str, list[Result]] = {}
    for result in results:
        done.setdefault(result.cell.mechanism, [])
        if result.status == "done":
            done[result.cell.mechanism].append(result)
    columns, rows = _columns(results), []
    for name, members in done.items():
        rows.append((name, len(members), [[v for r in members if (v := c.value(r)) is not None] for c in columns]))
    rows.sort(key=lambda row: -columns[0].better * statistics.fmean(row[2][0]) if row[2][0] else float("inf"))
    shown = [n for n in range(len(columns)) if n == 0 or any(row[2][n] for row in rows)]
    best = [_best([row[2][n] for row in rows], column.better) for n, column in enumerate(columns)]
    texts = []
    for name, _, values in rows:
        cells = [name]
        for n in shown:
            if not values[n]:
                cells.append("-")
                continue
            mean, write = statistics.fmean(values[n]), columns[n].spread
            spread = f" {write(statistics.stdev(values[n]))}" if write and len(values[n]) > 1 else ""
            cells.append(f"{'*' * (mean == best[n] and len(rows) > 1)}{columns[n].write(mean)}{spread}")
        texts.append(cells)
    wanted = [
        terminal.Column("mechanism", least=12),
        *(terminal.Column(columns[n].heading, rank=columns[n].rank, right=True) for n in shown),
    ]
    fitted = terminal.fitted(wanted, texts, within)
    if len(fitted) > len(texts) + 1:  # what had no room
        fitted[-1:] = [[part] for part in terminal.wrapped(fitted[-1][0], within=within)]
    counts = [None, *(count for _, count, _ in rows), *[None] * len(fitted)]
    return Text("\n").join(_styled(cells, count) for cells, count in zip(fitted, counts))


def _styled(cells: Sequence[str], count: int | None) -> Text:
    """A row of the table; `count` of results behind it, none for the headings and the note."""
    named, *numbers = cells
    out = Text(named, "dim" if count == 0 else "bold" if count is None and numbers else "")
    for cell in numbers:
        out.append(f"  {cell}", "bold green" if cell.lstrip().startswith("*") else "dim" if cell.strip() == "-" else "")
    out.rstrip()
    return out


def _best(values: list[list[float]], better: int) -> float | None:
    means = [statistics.fmean(some) for some in values if some]
    return None if not means or not better else max(means) if better > 0 else min(means)


def closing_lines(config: CompareConfig, outcome: Outcome, report: str) -> list[str]:
    """What is said under the table."""
    lines = []
    notes = {f"{result.cell.mechanism}: {note}": None for result in outcome.results for note in result.notes}
    lines += [terminal.line(note) for note in notes]
    for result in outcome.failed:
        what = "refused" if result.refused else "failed"
        lines.append(terminal.line(f"{what}: {label(result.cell)}: {result.reason}"))
    if outcome.failed and not outcome.signal:
        lines.append("failed cells stay as they are; --retry-failed runs them again")
    if outcome.signal:
        left = len(outcome.cells) - len(outcome.results)
        lines.append(f"stopped with {plural(left, 'cell')} to go; the same command goes on from here")
    lines.append(f"results: {Path(config.out) / 'results.db'}")
    if report:
        lines.append(report)
    if any(result.checkpoint for result in outcome.results):
        lines.append(f"models: {Path(config.out) / 'checkpoints'} (regard generate FILE --prompt TEXT)")
    return lines
