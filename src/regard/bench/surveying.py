"""A survey's table, and what is measured of it: growth over lengths, and quality at equal budget, side by side.

What can be causal is measured causal and trained on causal tasks; the rest has a table of its own, as have no place in
one those that read the future. Methods for models trained without them are only timed.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard import index, terminal
from regard.bench.surveys import FREE, Row, rows, survey
from regard.checks import whole
from regard.files import write_atomically

if TYPE_CHECKING:
    from regard.tasks import Metric

QUALITY = {True: ("mqar", "text"), False: ("digits",)}
"""The tasks for causal mechanisms, and for those that can only be bidirectional."""


@dataclass(frozen=True)
class Measuring:
    """What to measure of a survey, and where to keep it."""

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Tokens: 1k..32k doubles, 500,1k,3k lists."""
    dim: int = 256
    """M, the model width, over lengths; the tasks have their own."""
    heads: int = 4
    """H, query heads, likewise."""
    limit: float = 60.0
    """Seconds that one mechanism at one length may take."""
    steps: int | None = None
    """Training steps of a cell; none = the task's own."""
    seeds: Sequence[int] = (0, 1, 2)
    """Each mechanism is trained once with each."""
    out: Path = Path("runs/survey")
    """Folder of the results; training resumes there."""

    def __post_init__(self) -> None:
        whole("survey", dim=self.dim, heads=self.heads)
        if self.steps is not None:
            whole("survey", steps=self.steps)


class Stopped(Exception):
    """A signal ended the measuring; its number is the argument."""


@dataclass
class Found:
    """What was measured of one mechanism. Missing is None; `reasons` say why."""

    mechanism: str
    causal: bool
    time: float | None = None
    """The exponent e of seconds ~ length^e, forward."""
    memory: float | None = None
    """The same of peak bytes."""
    crossing: int | None = None
    """The least length measured at which, and at all above, it takes less time than the baseline."""
    quality: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    """Task -> mean over seeds and its spread."""
    reasons: list[str] = field(default_factory=list)


# --- the view -----------------------------------------------------------------------------------------------


def table(found: Iterable[Row]) -> list[str]:
    """A line for each method and card, as wide as the terminal."""
    columns = (
        terminal.Column("class", rank=2, least=12),
        terminal.Column("method"),
        terminal.Column("mechanism"),
        terminal.Column("causal", rank=3),
        terminal.Column("decodes", rank=4),
        terminal.Column("multiply-adds", least=16, rank=1),
        terminal.Column("state", least=10, rank=5),
    )
    texts, last = [], ("", "")
    for row in found:
        name = row.method.name + FREE * row.method.free
        kind = row.kind if row.kind != last[0] else ""
        said = (kind, name if (row.kind, name) != last else "")
        last = (row.kind, name)
        texts.append((*said, *_told(row.card)))
    return terminal.joined(terminal.fitted(columns, texts))


def _told(card: index.Entry | None) -> tuple[str, ...]:
    if card is None:
        return ("not built", "", "", "", "")
    able = (("yes" if card["supports"][what] else "no") for what in ("causal", "streaming"))
    return (card["name"], *able, card["cost"]["time"], card["cost"]["state"])


# --- the measuring ------------------------------------------------------------------------------------------


def measure(name: str, only: str, config: Measuring, *, say: Callable[[str], None]) -> list[Found]:
    """Profile and train what the survey covers and can be; keep it in survey.json after each part.

    Raises Stopped on SIGINT and SIGTERM.
    """
    from regard.tasks import Task

    survey(name)
    of = {card["name"]: row for row in rows(name, only, _mixes) if (card := row.card) is not None}
    found: list[Found] = []
    for causal in (True, False):
        mine = [n for n, row in of.items() if row.card is not None and row.card["supports"]["causal"] == causal]
        if not mine:
            continue
        group = {n: Found(n, causal) for n in dict.fromkeys((Task.baseline, *mine))}
        found += group.values()
        _lengths(group, config, say)
        _save(name, config, found)
        trained = [n for n in group if n not in of or not of[n].method.free]
        for task in QUALITY[causal]:
            _trained(task, [group[n] for n in trained], config, say)
            _save(name, config, found)
    return found


def _mixes(card: index.Entry) -> bool:
    return card["protocol"] == "TokenMixer"


def _lengths(group: dict[str, Found], config: Measuring, say: Callable[[str], None]) -> None:
    from regard.bench.process import Stop
    from regard.bench.profile import Profile, ProfileError, growth, made, run
    from regard.models.mixer import parse
    from regard.tasks import Task

    causal = next(iter(group.values())).causal
    able = []
    for name, one in group.items():
        try:
            made(parse(name), config.dim, config.heads, causal)
            able.append(name)
        except ProfileError as error:
            one.reasons.append(str(error))
    out = config.out / ("causal" if causal else "bidirectional")
    asked = Profile(tuple(able), config.lengths, config.dim, config.heads, causal=causal, limit=config.limit, out=out)
    stop = Stop()
    cells = run(asked, on_cell=lambda cell: say(f"{cell.mechanism} at {cell.length}"), stop=stop)
    if stop.number:
        raise Stopped(stop.number)
    seconds = {(c.mechanism, c.length): c.values["forward"] for c in cells if "forward" in c.values}
    for name in able:
        one = group[name]
        one.time, one.memory = (growth(cells, name, what) for what in ("forward", "forward_bytes"))
        one.reasons += [f"{c.length} tokens: {c.reason}" for c in cells if c.mechanism == name and c.reason]
        for n in sorted(config.lengths, reverse=True):
            mine, theirs = (seconds.get((who, n)) for who in (name, Task.baseline))
            if mine is None or (theirs is not None and mine >= theirs):
                break
            one.crossing = n


def _trained(task: str, group: Sequence[Found], config: Measuring, say: Callable[[str], None]) -> None:
    from regard.bench.compare import execute
    from regard.bench.config import CompareConfig
    from regard.bench.events import Finished
    from regard.bench.fitting import sizes, why_not
    from regard.bench.report.groups import grouped
    from regard.models.mixer import parse
    from regard.tasks import find, make, mechanisms_for

    made, able = make(task), {}
    fitting = {parse(text).name: text for text in mechanisms_for(task)}  # with options of the task's own size
    for one in group:
        text = fitting.get(one.mechanism, one.mechanism)
        reasons = why_not(made, parse(text), sizes(made))
        one.reasons += [f"{task}: {reason}" for reason in reasons]
        if not reasons:
            able[str(parse(text))] = one
    asked = CompareConfig(task, list(able), seeds=config.seeds, steps=config.steps, out=config.out / task)

    def seen(event: Any) -> None:
        if isinstance(event, Finished):
            say(f"{task}: {event.result.cell.mechanism} with seed {event.result.cell.seed}")

    outcome = execute(asked, seen)
    if outcome.signal:
        raise Stopped(outcome.signal)
    for failed in outcome.failed:
        able[failed.cell.mechanism].reasons.append(f"{task}: {failed.reason}")
    main = find(task).metric.main
    for row in (row for group_ in grouped(outcome.results) for row in group_.rows):
        if (stat := row.heldout.get(main)) is not None and row.mechanism in able:
            able[row.mechanism].quality[task] = (stat.mean, stat.spread)


def _save(name: str, config: Measuring, found: Sequence[Found]) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    record = {"survey": name, "settings": {**asdict(config), "out": str(config.out)}, "found": [*map(asdict, found)]}
    write_atomically(config.out / "survey.json", json.dumps(record, indent=1) + "\n")


def measured(found: Sequence[Found]) -> list[str]:
    """Two tables at most: of the causal ones, and of the others."""
    from regard.tasks import find

    lines: list[str] = []
    for causal, tasks in QUALITY.items():
        group = [one for one in found if one.causal == causal]
        if not group:
            continue
        metrics = [find(task).metric for task in tasks]
        columns = [
            terminal.Column("causal" if causal else "bidirectional"),
            terminal.Column("time", right=True),
            terminal.Column("memory", rank=2, right=True),
            terminal.Column("faster from", rank=1, right=True),
            *(terminal.Column(f"{t}, {m.short}", right=True) for t, m in zip(tasks, metrics)),
        ]
        texts = []
        for one in group:
            grown = (f"T^{e:.2f}" if e is not None else "-" for e in (one.time, one.memory))
            scores = (_score(one.quality.get(task), metric) for task, metric in zip(tasks, metrics))
            texts.append((one.mechanism, *grown, str(one.crossing or "-"), *scores))
        lines += [*terminal.joined(terminal.fitted(columns, texts)), ""]
    for one in found:
        for reason in one.reasons:
            lines += terminal.wrapped(terminal.line(f"- {one.mechanism}: {reason}"), hang=2)
    return lines


def _score(stat: tuple[float, float | None] | None, metric: "Metric") -> str:
    if stat is None:
        return "-"
    mean, spread = stat
    return metric.number(mean) + ("" if spread is None else f" ± {metric.number(spread)}")
