"""The main job: train every mechanism in the same model on the same data, and keep what each cell found.

A cell is one mechanism with one seed. Cells run one after the other, each in a process of its own with all
cores, so that their memory can be compared; speeds are measured in turns when all are trained. Each cell is committed
when it ends; the same command goes on where it stopped.
"""

import errno
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard import terminal
from regard.bench.cells import plan
from regard.bench.config import Checked, CompareConfig, CompareError, one_line, task_options, validate
from regard.bench.events import Event, Finished, Outcome, Planned, Started, Stepped, Timed
from regard.bench.process import Stop, answer
from regard.bench.record import Cell, Result
from regard.bench.store import Store, StoreError, disk_full, opened
from regard.models.mixer import parse_stack
from regard.tasks import TaskError

if TYPE_CHECKING:
    from rich.console import Console

OnEvent = Callable[[Event], None]


def execute(config: CompareConfig, on_event: OnEvent = lambda event: None, *, train: Any = answer) -> Outcome:
    """Check everything, then run what is not in the store yet. Raises CompareError.

    Args:
        on_event: is called with every Event, in order.
        train: runs one job; for tests.
    """
    with one_line(TaskError, StoreError):
        checked = validate(config, train)
        config, cells = checked.config, plan(checked)
        # Until here nothing is lost when a signal ends the process at once.
        with Stop() as stop, opened(config.out) as store:
            known = {cell.key: _reusable(store, cell, config) for cell in cells}
            on_event(_planned(checked, cells, known, store))
            for number, cell in enumerate(cells, 1):
                if known[cell.key] is not None or stop.number:
                    continue
                on_event(Started(cell, number))
                result = _run(cell, config, stop, on_event, train)
                if result is None:
                    break
                store.put(result)
                known[cell.key] = result
                on_event(Finished(result, number))
            results = [result for cell in cells if (result := known[cell.key]) is not None]
            untimed = "" if stop.number else _timed(results, store, config, stop, on_event, train)
    failed = [result for result in results if result.status == "failed"]
    # A signal that came after all was done took nothing away.
    ended = len(results) == len(cells) and not (stop.number and _untimed(results))
    return Outcome(results, cells, 0 if ended else stop.number, failed, untimed)


def run(config: CompareConfig, *, console: "Console | None" = None) -> int:
    """Compare with live progress, a table and a report.

    Returns the exit code: 0, 3 if some cells failed, 130 or 143 if stopped by SIGINT or SIGTERM. Raises
    CompareError, whose text is the one-line reason.
    """
    from regard.bench.closing import closing_lines, table
    from regard.bench.live import Live

    with Live(config, console) as live:
        outcome = execute(config, live)
    live.console.print()
    if outcome.results:
        live.console.print(table(outcome.results, live.console.width), soft_wrap=True)
    report = "" if outcome.signal or not outcome.results else _report(outcome.results, Path(config.out))
    for line in closing_lines(config, outcome, report):
        for part in terminal.wrapped(line, hang=2, within=live.console.width):
            live.console.print(part, markup=False, highlight=False, soft_wrap=True)
    return outcome.exit_code


def _reusable(store: Store, cell: Cell, config: CompareConfig) -> Result | None:
    """What an earlier run found, unless the cell must run again."""
    result = store.get(cell.key)
    if result is None or (result.status == "failed" and config.retry_failed):
        return None
    if config.checkpoint and result.status == "done" and not (store.folder / (result.checkpoint or "?")).is_file():
        return None
    return result


def _planned(checked: Checked, cells: Sequence[Cell], known: dict[str, Result | None], store: Store) -> Planned:
    others = [result.cell for result in store.results() if result.cell.key not in known]
    mine = {cell.mechanism: cell.settings for cell in reversed(cells)}
    differing: set[str] = set()
    for other in others:  # each is held against the same mechanism, where that is asked for
        settings = mine.get(other.mechanism, {**cells[0].settings, "code": other.settings.get("code")})
        differing |= {name for name in settings if other.settings.get(name) != settings[name]}
    reused = [result for result in known.values() if result is not None]
    counts = (list(cells), reused, len(others), sorted(differing))
    return Planned(checked.task.metric, *counts, checked.unfit, checked.others, checked.task.told())


def _run(cell: Cell, config: CompareConfig, stop: Stop, on_event: OnEvent, train: Any) -> Result | None:
    """One cell in its process; None if stopped."""
    job = _job(cell, config)
    said = train(job, timeout=config.timeout, stop=stop, on_step=lambda step, loss: on_event(Stepped(cell, step, loss)))
    if said is None:
        return None
    if "full" in said:
        raise CompareError(disk_full(Path(config.out) / "checkpoints"))
    if "failed" in said:
        result = Result(cell, "failed", reason=said["failed"], traceback=said.get("traceback", ""))
    else:
        result = Result(cell, **said["result"])
    if lines := said.get("ignored"):
        told = f"something else was written among the events of its process; ignored: {lines:,} lines"
        result = replace(result, notes=[*result.notes, told])
    return result


def _untimed(results: Sequence[Result]) -> bool:
    """Whether speeds are missing, or were not all measured in turns with each other."""
    turns = {result.turns for result in results if result.status == "done"}
    return len(turns) > 1 or "" in turns


def _timed(
    results: list[Result], store: Store, config: CompareConfig, stop: Stop, on_event: OnEvent, train: Any
) -> str:
    """Measure the speeds of what is done, in turns, and keep them. Returns why there are none, or ''."""
    done = [result for result in results if result.status == "done"]
    if not _untimed(results):
        return ""
    names = list(dict.fromkeys(result.cell.mechanism for result in done))
    said, untimed = None, []
    while names:
        at = _At(names, on_event)
        job = {**_job(done[0].cell, config), "speeds": names}
        said = train(job, timeout=config.timeout, stop=stop, on_step=at)
        if said is None or "result" in said or not parse_stack(at.name).own:
            break
        # A fault of the caller's own takes the others' speeds no more than their cells.
        untimed.append(f"{at.name}: {said.get('failed', 'no answer')}")
        names = [name for name in names if name != at.name]
    if not names or said is None or "result" not in said:
        return "; ".join([*untimed, *filter(None, [(said or {}).get("failed", "")] if names else [])])
    turns = datetime.now(UTC).isoformat(timespec="milliseconds")
    for place, result in enumerate(results):
        if result.status == "done" and result.cell.mechanism in names:
            results[place] = replace(result, turns=turns, **said["result"].get(result.cell.mechanism, {}))
            store.put(results[place])
    return "; ".join(untimed)


class _At:
    """Tells the turns, and knows whose it is."""

    def __init__(self, names: list[str], on_event: OnEvent) -> None:
        self.names, self.name, self.on_event = names, names[0], on_event
        on_event(Timed(0, names))

    def __call__(self, turn: int, place: float) -> None:
        self.name = self.names[int(place)]
        self.on_event(Timed(turn, self.names))


def _job(cell: Cell, config: CompareConfig) -> dict[str, Any]:
    """What the worker is told."""
    name = re.sub(r"[^\w.+-]+", "_", cell.mechanism).strip("._")[:60]
    return {
        "cell": vars(cell),
        "options": task_options(config)[1],
        "folder": os.fspath(Path(config.out).absolute()),
        "checkpoint": f"checkpoints/{name}-seed{cell.seed}-{cell.key[:8]}.safetensors" if config.checkpoint else "",
    }


def _report(results: Sequence[Result], folder: Path) -> str:
    """Write the report; returns the line that says where it is, or what it lacks."""
    from regard.bench import report

    path = folder / "report.html"
    try:
        report.write(results, path)
    except ModuleNotFoundError as error:
        return str(error)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CompareError(disk_full(path)) from error
        raise CompareError(f"{path} cannot be written: {error.strerror}; the results are kept") from error
    return f"report: {path}"
