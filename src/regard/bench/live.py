"""What a comparison shows in a terminal while it runs."""

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from regard import terminal
from regard.bench.config import CompareConfig
from regard.bench.events import TURNS, Event, Finished, Planned, Started, Stepped, Timed
from regard.bench.record import Cell, Result


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
            case Timed():
                note = f"of {plural(len(event.mechanisms), 'mechanism')}, in turns"
                self._bars.update(self._cell, total=TURNS, completed=event.turn, description="speeds", note=note)

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
        for told in event.data[:1]:  # the report has the rest
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
    return f"{label(result.cell)}: {metric.write(result.heldout[metric.main])} {metric.name}, {result.seconds:.0f} s"
