"""What a comparison shows in a terminal at its end: a table, what may be said of it, and where everything is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from regard import terminal
from regard.bench.config import CompareConfig
from regard.bench.events import Outcome
from regard.bench.live import label, plural
from regard.bench.record import Result
from regard.bench.report.groups import MEASURES, Group, Row, Stat, grouped, undecided
from regard.bench.report.verdict import verdict
from regard.bench.report.wording import sentences
from regard.tasks import Metric


@dataclass(frozen=True)
class Column:
    heading: str
    find: Callable[[Row], Stat | None]
    write: Callable[[float], str]
    better: int
    """1: more is better, -1: less is, 0: neither."""
    rank: int
    """Those of higher rank are left out first where there is no room; 0 stays."""
    spread: bool = False
    """Whether its spread is shown."""


def _costs() -> list[Column]:
    def cost(heading: str, name: str, write: Callable[[float], str], rank: int) -> Column:
        return Column(heading, lambda row: row.measures.get(name), write, MEASURES[name][2], rank)

    return [
        cost("train tok/s", "train_tokens_per_second", si, 1),
        cost("gen tok/s", "generate_tokens_per_second", si, 5),
        cost("peak MB", "peak_memory_bytes", lambda value: f"{value / 1e6:.0f}", 2),
        cost("state KB", "state_bytes", lambda value: f"{value / 1e3:.1f}", 6),
        cost("params", "parameters", si, 4),
    ]


def table(results: Sequence[Result], within: int | None = None) -> Text:
    """One row a mechanism, the best on held-out data first; the best of a column is bold with a star.

    ± is the standard deviation over seeds, ~ stands where a column's best is not told apart from it. What has no room
    is left out, the main number and speed last.
    """
    (group,) = grouped(results)
    columns = [_heldout(group, label) for label in group.labels or [group.metric.main]] + _costs()
    shown = [column for column in columns if column.rank == 0 or any(map(column.find, group.rows))]
    names = [row.label for row in group.rows]
    within = terminal.width() if within is None else within
    numbered = terminal.apart(names) > within // 2  # what would be left of them would be alike
    texts = [[f"{n} {name}" if numbered else name] for n, name in enumerate(names, 1)]
    for column in shown:
        for cells, written in zip(texts, _written(group, column)):
            cells.append(written)
    wanted = [
        terminal.Column("mechanism", least=12 if numbered else max(12, terminal.apart(names))),
        *(terminal.Column(column.heading, rank=column.rank, right=True) for column in shown),
    ]
    fitted = terminal.fitted(wanted, texts, within)
    if len(fitted) > len(texts) + 1:  # what had no room
        fitted[-1:] = [[part] for part in terminal.wrapped(fitted[-1][0], within=within)]
    for n, name in enumerate(names if numbered else (), 1):
        fitted += [[part] for part in terminal.wrapped(f"{n} {name}", hang=2, within=within)]
    counts = [None, *(len(row.done) for row in group.rows), *[None] * len(fitted)]
    return Text("\n").join(_styled(cells, count) for cells, count in zip(fitted, counts))


def _heldout(group: Group, label: str) -> Column:
    metric, main = group.metric, label == group.main

    def find(row: Row) -> Stat | None:
        return row.heldout.get(label)

    return Column(metric.title(label), find, metric.write, metric.better, 3 * (not main), spread=True)


def _written(group: Group, column: Column) -> list[str]:
    """The cells of a column, with the signs of its best and of what is not told apart from that."""
    stats = [column.find(row) for row in group.rows]
    finite = [stat for stat in stats if stat is not None and stat.finite]
    sign = column.better if len(group.rows) > 1 and len({column.write(stat.mean) for stat in finite}) > 1 else 0
    best = max(finite, key=lambda stat: sign * stat.mean) if sign else None
    told = verdict(group) if column.rank == 0 else None
    cells = []
    for row, stat in zip(group.rows, stats):
        if stat is None:
            cells.append("-")
            continue
        pair = told.of(row) if told else None
        like = not pair.apart if pair else best is not None and undecided(best, stat)
        mark = "" if best is None else "*" if column.write(stat.mean) == column.write(best.mean) else "~" * like
        cells.append(f"{mark}{column.write(stat.mean)}{_spread(group.metric, stat) if column.spread else ''}")
    return cells


def _spread(metric: Metric, stat: Stat) -> str:
    """A standard deviation in a few characters: ' ±.012', or ' ±1.2' of percents."""
    if stat.spread is None:
        return ""
    return f" ±{100 * stat.spread:.1f}" if metric.percent else f" ±{stat.spread:.3f}".replace("±0.", "±.")


def _styled(cells: Sequence[str], count: int | None) -> Text:
    """A row of the table; `count` of results behind it, none for the headings and the note."""
    named, *numbers = cells
    out = Text(named, "dim" if count == 0 else "bold" if count is None and numbers else "")
    for cell in numbers:
        out.append(f"  {cell}", "bold green" if cell.lstrip().startswith("*") else "dim" if cell.strip() == "-" else "")
    out.rstrip()
    return out


def si(value: float) -> str:
    """Three digits with a prefix: 51.7k."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{prefix}" if value < 999.5 * size else f"{value / size:.0f}{prefix}"
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def closing_lines(config: CompareConfig, outcome: Outcome, report: str) -> list[str]:
    """What is said under the table."""
    lines = [terminal.line(sentence) for group in grouped(outcome.results) for sentence in sentences(group)]
    notes = {f"{result.cell.mechanism}: {note}": None for result in outcome.results for note in result.notes}
    lines += [terminal.line(note) for note in notes]
    for result in outcome.failed:
        what = "refused" if result.refused else "failed"
        lines.append(terminal.line(f"{what}: {label(result.cell)}: {result.reason}"))
    if outcome.failed and not outcome.signal:
        lines.append("failed cells stay as they are; --retry-failed runs them again")
    if outcome.untimed:
        lines.append(terminal.line(f"speeds could not be measured: {outcome.untimed}"))
    if outcome.signal:
        left = len(outcome.cells) - len(outcome.results)
        todo = f"{plural(left, 'cell')} to go" if left else "speeds to be measured"
        lines.append(f"stopped with {todo}; the same command goes on from here")
    lines.append(f"results: {Path(config.out) / 'results.db'}")
    if report:
        lines.append(report)
    if any(result.checkpoint for result in outcome.results):
        lines.append(f"models: {Path(config.out) / 'checkpoints'} (regard generate FILE --prompt TEXT)")
    return lines
