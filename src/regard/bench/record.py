"""What one cell of a comparison is, and what it found. The store keeps these; report and table read them."""

import hashlib
import json
import math
import re
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from regard.files import parsed
from regard.tasks import Metric

Match = Literal["params", "flops"]
"""What all mechanisms of a comparison have as much of as the task's baseline."""


@dataclass(frozen=True)
class Cell:
    """One training run: everything that decides its outcome, and nothing else."""

    task: str
    """A name of `regard.tasks`; its options are among the settings."""
    mechanism: str
    """A name that `regard.create` takes, e.g. 'alibi' or 'gated+rotary'."""
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    """Steps, batch, length, dim, depth, heads, learning rate, match, data fingerprint, code version, …"""

    @property
    def key(self) -> str:
        """Content hash: equal cells have equal keys, and any changed setting gives another."""
        text = json.dumps(asdict(self), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Result:
    """What a cell found. Units are in the names, and those of losses and of held-out data in `metric`."""

    cell: Cell
    status: Literal["done", "failed"]
    reason: str = ""
    """Why it failed, in one line; with file and line where the caller's own code did."""
    traceback: str = ""
    """Where it failed, as Python tells it."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(step, training loss) along the run."""
    heldout: dict[str, float] = field(default_factory=dict)
    """What `metric` measures on held-out data by label, as '1x', '2x' and '4x' the training length."""
    parameters: int = 0
    flops_per_token: float = 0.0
    """Forward multiply-adds x 2, per token of an example."""
    mlp_dim: int = 0
    """Hidden width of the host's MLP after matching."""
    train_tokens_per_second: float = 0.0
    """Measured in turns with the other mechanisms of the run, at its end; 0 until then. So are the next three."""
    train_spread: float = 0.0
    """Half the distance between the quartiles over the rounds."""
    generate_tokens_per_second: float = 0.0
    generate_spread: float = 0.0
    turns: str = ""
    """When that was: those of the same time were measured in turns with each other."""
    peak_memory_bytes: int = 0
    """Peak resident memory that training added, or the device's peak on a GPU."""
    state_bytes: int = 0
    """Size of one sequence's streaming state after the length of an example."""
    seconds: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)
    """Device name, torch and regard versions, threads."""
    checkpoint: str = ""
    """Path of the saved model relative to the run's folder, or ''."""
    notes: list[str] = field(default_factory=list)
    """What could not be measured and why, one line each."""
    data: list[str] = field(default_factory=list)
    """What was read for the data, what was not, and what was held out, one line each."""
    metric: Metric = field(default_factory=Metric)
    """What was measured; the default is that of `text`, as in rows of old."""

    @property
    def refused(self) -> bool:
        """Whether it failed because the mechanism is not what it claims to be: it breaks the law named first."""
        return self.status == "failed" and re.match(r"L\d+: ", self.reason) is not None

    def __post_init__(self) -> None:
        # As JSON gives it back, from a worker or from the store.
        if isinstance(self.metric, dict):
            known = {f.name for f in fields(Metric)}
            object.__setattr__(self, "metric", Metric(**{k: v for k, v in self.metric.items() if k in known}))
        object.__setattr__(self, "curve", [(int(step), float(loss)) for step, loss in self.curve])


def stored(cell: object, result: object) -> Result:
    """The result that two texts of JSON say. ValueError or TypeError where a value is not of its field's kind.

    Fields of `Result` and `Metric` that this version has not are left out.
    """
    if not isinstance(cell, str) or not isinstance(result, str):
        raise TypeError(f"it is stored as {type(cell).__name__} and {type(result).__name__}, not as text")
    said, found = parsed(cell), parsed(result)
    if not isinstance(said, dict) or not isinstance(found, dict) or not _is(found.get("metric", {}), dict[str, Any]):
        raise TypeError("it is no object")
    _check_kinds(Cell, said)
    found = {name: value for name, value in found.items() if name in _FIELDS and name != "cell"}
    _check_kinds(Result, found)
    _check_kinds(Metric, found.get("metric", {}))
    return Result(cell=Cell(**said), **found)


_FIELDS = {field.name for field in fields(Result)}


def _check_kinds(kind: type, said: dict[str, Any]) -> None:
    hints = typing.get_type_hints(kind)
    for name, value in said.items():
        if name in hints and not _is(value, hints[name]):
            raise TypeError(f"its {name} is {str(value)[:40]!r}; expected {_words(hints[name])}")


def _words(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)) if not typing.get_args(kind) else str(kind).replace("typing.", "")


def _is(value: Any, kind: Any) -> bool:
    """Whether a value of JSON may stand in a field of this type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if is_dataclass(kind):
        return isinstance(value, dict)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_is(one, inner[0]) for one in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(inner) and all(map(_is, value, inner))
    if origin is dict:
        return isinstance(value, dict) and all(_is(one, inner[1]) for one in value.values())
    if kind is float:
        return _is(value, int) or (isinstance(value, float) and math.isfinite(value))
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, kind)
