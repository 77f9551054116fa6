"""Data that asks something of an attention mechanism: one module a task, each with a class `Task` of its own.

`regard compare --task NAME` trains any of them in one loop. All data but `text` is made from seeds, or comes with
an installed package; nothing is downloaded.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from regard.cards import Card
from regard.checks import whole
from regard.index import lacks, unknown
from regard.spec import Mechanism, Part, single

if TYPE_CHECKING:  # so that the names of tasks are known without torch
    import torch
    from torch import Tensor, nn

Batch = tuple[Any, ...]
"""What a training step sees: tensors, or tuples of them; the examples lie along the first axis."""
HELDOUT_SEED = 2**32 - 17
"""The seed of generated held-out data, which no run is likely to have. Torch's generators heed 32 bits of a seed."""


class TaskError(ValueError):
    """The task cannot be done as asked; the message is one line."""


@dataclass(frozen=True)
class Metric:
    """What is measured on held-out data, as tables and reports need to know it. The default is that of `text`."""

    name: str = "bits per byte"
    short: str = "bits/byte"
    better: int = -1
    """1: more is better; -1: less is."""
    main: str = "1x"
    """The label of the number that ranks."""
    along: str = "length, in training lengths"
    """What the labels count, e.g. 'pairs'; '' where there is one number only."""
    loss: str = "bits per byte"
    """What the training loss is measured in."""
    percent: bool = False
    """Whether numbers are shares, to be shown as percentages."""

    @property
    def by_length(self) -> bool:
        """Whether labels are lengths of text, in training lengths: '1x', '2x'."""
        return self.main == "1x"

    def number(self, value: float) -> str:
        """A value, a spread or a difference without its unit."""
        return f"{100 * value:.1f}" if self.percent else f"{value:.3f}"

    def write(self, value: float) -> str:
        """A value as it stands alone: '97.3%' or '1.420'."""
        return self.number(value) + "%" * self.percent

    def title(self, label: str) -> str:
        """How a held-out number is called in a table: 'bits/byte 1x', 'accuracy', '4 pairs'."""
        if label == self.main:
            return self.short if self.main in ("mean", self.short) else f"{self.short} {label}"
        return label if label.endswith("x") else f"{label} {self.along}".strip()


ACCURACY = Metric("accuracy", "accuracy", better=1, main="accuracy", along="", loss="bits", percent=True)


@dataclass(frozen=True)
class Size:
    """How large the host model around a mechanism is."""

    dim: int
    depth: int
    heads: int
    mlp_dim: int


@dataclass(frozen=True)
class Defaults:
    """What a comparison does unless it is told otherwise: chosen to take minutes on two cores."""

    steps: int
    batch: int
    dim: int
    depth: int
    heads: int
    lr: float
    mlp: int = 4
    """The width of the baseline's MLPs, in widths of the model."""


@dataclass(frozen=True)
class Task:
    """One task. Its fields are its options: whole numbers, floats, texts and tuples of them."""

    name: ClassVar[str]
    gist: ClassVar[str]
    """One line, under 90 characters."""
    takes: ClassVar[Mapping[str, frozenset[str]]]
    """Protocol -> the features (of card.FEATURES) that a mechanism of that protocol must have."""
    metric: ClassVar[Metric]
    defaults: ClassVar[Defaults]
    baseline: ClassVar[str] = "softmax"
    """The mechanism whose budget all others get."""
    loss_scale: ClassVar[float] = 1.0
    """What a loss is multiplied with to be in `metric.loss`."""
    keeps_models: ClassVar[bool] = False
    """Whether `keep` can write a trained model to a file."""

    @classmethod
    def mechanisms(cls) -> tuple[str, ...]:
        """What is compared unless others are named: the baseline, and the mechanisms whose cards name this task."""
        return tuple(dict.fromkeys([cls.baseline, *mechanisms_for(cls.name)]))

    def fits(self, card: Card) -> list[str]:
        """Why this mechanism cannot do the task; [] if it can, as far as its card tells."""
        if card.protocol not in self.takes:
            return [f"a {card.protocol}; {self.name} takes {', '.join(f'{p}s' for p in self.takes)}"]
        return [LACKING[feature] for feature in sorted(self.takes[card.protocol].difference(card.supports))]

    @property
    def tokens(self) -> int:
        """Tokens of one example: what mechanisms mix, be they bytes, pixels, nodes or steps of a series."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What a result's settings say about the data: all that decides it."""
        return {"data": self.describe(), **_plain(asdict(self))}

    def describe(self) -> str:
        """The data in a few words."""
        raise NotImplementedError

    def told(self) -> list[str]:
        """What was read, what was not and what is held out: a line in short, then one each; [] where all is made."""
        return []

    def model(self, mechanism: Mechanism, size: Size) -> "nn.Module":
        """The host with this mechanism in it, initialised from torch's generator.

        Its `mixers` are the modules that the mechanism made, and its MLPs are `size.mlp_dim` wide.
        """
        raise NotImplementedError

    def example(self) -> Batch:
        """What the model is called with for a single example."""
        raise NotImplementedError

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        """Training data without end; the seed alone decides it."""
        raise NotImplementedError

    def loss(self, model: "nn.Module", batch: Batch) -> "Tensor":
        """What training lowers."""
        raise NotImplementedError

    def measure(self, model: "nn.Module", batch: int, device: "torch.device") -> tuple[dict[str, float], list[str]]:
        """Numbers on held-out data by label, that of `metric.main` first; and a line for each that is missing."""
        raise NotImplementedError

    def keep(self, model: "nn.Module", mechanism: Mechanism, size: Size, path: Path) -> None:
        """Write a trained model to a file, where `keeps_models`."""
        raise NotImplementedError


LACKING = {
    "causal": "cannot be causal",
    "bidirectional": "can only be causal",
    "cross": "takes no other sequence to attend to",
}


def names() -> list[str]:
    """All tasks, the default first."""
    found = (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return sorted(found, key=lambda name: (name != "text", name))


def find(name: str) -> type[Task]:
    """The class of that name. Raises TaskError with near names if there is none."""
    if name not in names():
        raise TaskError(unknown("task", name, names()))
    module = importlib.import_module(f"{__name__}.{name}")
    return next(
        value for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and getattr(value, "name", "") == name
    )  # fmt: skip


def mechanisms_for(name: str) -> list[str]:
    """The mechanisms whose cards name this task (or `profile`), with the options that they give themselves there.

    A card with `tasks=("mqar(block=8)", "text")` is compared on mqar with that option, and on text without.
    """
    from regard import catalog

    entries = ((card.name, single(entry, "task")) for card in catalog.cards().values() for entry in card.tasks)
    return [str(Part(mechanism, entry.options)) for mechanism, entry in entries if entry.name == name]


def make(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task of that name with these options. Raises TaskError for options that it lacks or cannot be."""
    task, options = find(name), options or {}
    known = [f.name for f in fields(task) if f.init]
    for option in options:
        if option not in known:
            raise TaskError(f"task {lacks(name, 'option', option, known)}")
    several = {f.name for f in fields(task) if isinstance(f.default, tuple)}
    try:
        return task(**{name: _tuple(value) if name in several else value for name, value in options.items()})
    except TaskError:
        raise
    except (ValueError, TypeError) as error:
        raise TaskError(f"task {error}") from error


def counts(task: Task, **least: int) -> None:
    """Refuse options that are no ints, or tuples of ints, from the least that is named for each."""
    for option, minimum in least.items():
        value = getattr(task, option)
        for number in value if isinstance(value, tuple) and value else (value,):
            whole(task, minimum, **{option: number})


def _tuple(value: Any) -> Any:
    """A list as a tuple, and a value alone as a tuple of one."""
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, int | float | str) else value


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
