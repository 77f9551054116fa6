"""What one cell of a comparison is, and what it found. The store keeps these; report and table read them."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

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
