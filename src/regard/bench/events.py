"""What a comparison tells while it runs, in this order, and what is there at its end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from regard.bench.record import Cell, Result
from regard.tasks import Metric

TURNS = 9
"""How often each mechanism has its turn when speeds are measured."""
PARTIAL = 3
"""Exit code when some cells failed and the rest is done."""


@dataclass(frozen=True)
class Planned:
    """What will be done: all cells, those that are there already, and the store's rows of other runs."""

    metric: Metric
    cells: list[Cell]
    reused: list[Result]
    others: int
    differing: list[str]
    """Settings in which those other rows differ."""
    unfit: Mapping[str, str]
    """Mechanisms that the task cannot be done with -> why."""
    named: Sequence[str] = ()
    """A line for each that is another mechanism at this size."""
    data: Sequence[str] = ()
    """What was read for the data, what was not, and what is held out: the first line tells it in short."""


@dataclass(frozen=True)
class Started:
    """A cell begins."""

    cell: Cell
    number: int
    """From 1, among all cells."""


@dataclass(frozen=True)
class Stepped:
    """A cell has trained one step more."""

    cell: Cell
    step: int
    loss: float
    """Training loss, in the metric's unit."""


@dataclass(frozen=True)
class Finished:
    """A cell has ended, well or not, and its row is committed."""

    result: Result
    number: int


@dataclass(frozen=True)
class Timed:
    """Speeds are being measured, in turns; each mechanism has had so many."""

    turn: int
    mechanisms: Sequence[str]


Event = Planned | Started | Stepped | Finished | Timed


@dataclass(frozen=True)
class Outcome:
    """What is there at the end."""

    results: list[Result]
    """In the order of the plan; cells that were not reached are missing."""
    cells: list[Cell]
    signal: int = 0
    """The signal that ended the run early, or 0."""
    failed: list[Result] = field(default_factory=list)
    untimed: str = ""
    """Why no speeds could be measured, or ''."""

    @property
    def exit_code(self) -> int:
        return 128 + self.signal if self.signal else PARTIAL if self.failed else 0
