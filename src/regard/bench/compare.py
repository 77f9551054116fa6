"""The main job: train every mechanism in the same model on the same data, and keep what each cell found.

A cell is one mechanism with one seed. Cells run one after the other, each in a process of its own with all
cores, so that their times and memory can be compared. Each is committed when it ends; the same command goes
on where it stopped.
"""

import contextlib
import errno
import hashlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.bench.match import Match
from regard.bench.process import Stop, answer
from regard.bench.record import Cell, Result
from regard.bench.store import Store, StoreError, disk_full, opened
from regard.tasks import Defaults, Metric, Task, TaskError, find, make

if TYPE_CHECKING:
    from rich.console import Console

ALL = "all"
"""Among mechanisms: every one of the catalogue that the task can be done with."""
PARTIAL = 3
"""Exit code when some cells failed and the rest is done."""


class CompareError(ValueError):
    """The comparison cannot be done as asked; the message is one line."""


@dataclass(frozen=True)
class CompareConfig:
    """What `regard compare` is asked to do."""

    task: str = "text"
    """A name of `regard.tasks`, with options in brackets: 'mqar(pairs=(4, 8))'."""
    mechanisms: Sequence[str] | None = None
    """Names, with options in brackets: 'window(window=64)'; also 'gated+rotary', own 'module:callable', and 'all'.

    None, here and below: what the task has by default."""
    text: Sequence[str | Path] = ()
    """A file or folder, for the task `text`; none = the standard library's sources and docs."""
    seeds: Sequence[int] = (0, 1)
    """Each mechanism is trained once with each."""
    steps: int | None = None
    """Training steps of a cell."""
    batch: int | None = None
    """Sequences of a step."""
    length: int | None = None
    """Tokens of a sequence: bytes, for text."""
    dim: int | None = None
    """Width of the model."""
    depth: int | None = None
    """Layers of the model."""
    heads: int | None = None
    """Heads of a layer."""
    lr: float | None = None
    """Highest learning rate."""
    match: Match = "params"
    """What is equal to the task's baseline's, by the width of the host's MLPs."""
    out: str | Path = Path("runs/compare")
    """Folder of the results; the same command resumes there."""
    checkpoint: bool = False
    """Keep the trained models."""
    device: str = "cpu"
    """'cpu', 'cuda' or 'cuda:N'."""
    threads: int | None = None
    """CPU threads of a cell; none given = all cores, at most 8."""
    timeout: float = 3600
    """Seconds after which a cell counts as failed."""
    retry_failed: bool = False
    """Run cells again that failed in an earlier run."""


@dataclass(frozen=True)
class Checked:
    """A configuration that can be carried out, with the task's defaults filled in."""

    config: CompareConfig
    task: Task
    specs: list[str]
    """The mechanisms, spelled out."""
    unfit: Mapping[str, str] = field(default_factory=dict)
    """Those that 'all' leaves out -> why."""


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


@dataclass(frozen=True)
class Started:
    cell: Cell
    number: int
    """From 1, among all cells."""


@dataclass(frozen=True)
class Stepped:
    cell: Cell
    step: int
    loss: float
    """Training loss, in the metric's unit."""


@dataclass(frozen=True)
class Finished:
    result: Result
    number: int


Event = Planned | Started | Stepped | Finished


@dataclass(frozen=True)
class Outcome:
    """What is there at the end."""

    results: list[Result]
    """In the order of the plan; cells that were not reached are missing."""
    cells: list[Cell]
    signal: int = 0
    """The signal that ended the run early, or 0."""
    failed: list[Result] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 128 + self.signal if self.signal else PARTIAL if self.failed else 0


def execute(
    config: CompareConfig, on_event: Callable[[Event], None] = lambda event: None, *, train: Any = answer
) -> Outcome:
    """Check everything, then run what is not in the store yet. Raises CompareError.

    Args:
        on_event: is called with every Event, in order.
        train: runs one job; for tests.
    """
    with _one_line(), Stop() as stop:
        checked = validate(config)
        config, cells = checked.config, plan(checked)
        with opened(config.out) as store:
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
    failed = [result for result in results if result.status == "failed"]
    # A signal that came after the last cell took nothing away.
    return Outcome(results, cells, stop.number if len(results) < len(cells) else 0, failed)


def run(config: CompareConfig, *, console: "Console | None" = None) -> int:
    """Compare with live progress, a table and a report.

    Returns the exit code: 0, 3 if some cells failed, 130 or 143 if stopped by SIGINT or SIGTERM. Raises
    CompareError, whose text is the one-line reason.
    """
    from regard.bench.live import Live, closing_lines, table

    with Live(config, console) as live:
        outcome = execute(config, live)
    live.console.print()
    if outcome.results:
        live.console.print(table(outcome.results))
    report = "" if outcome.signal or not outcome.results else _report(outcome.results, Path(config.out))
    for line in closing_lines(config, outcome, report):
        live.console.print(line, markup=False, highlight=False, soft_wrap=True)
    return outcome.exit_code


def validate(config: CompareConfig) -> Checked:
    """Refuse what cannot work before any work is done."""
    task = _task(config)
    config = _filled(config, task.defaults)
    for name, least in (("steps", 1), ("batch", 1), ("dim", 1), ("depth", 1), ("heads", 1)):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CompareError(f"{name} must be a whole number >= {least}, got {value!r}")
    dim, heads = config.dim or 1, config.heads or 1
    if dim % heads:
        near = [h for h in range(1, dim + 1) if dim % h == 0]
        best = sorted(near, key=lambda h: abs(h - heads))[:3]
        raise CompareError(f"{heads} heads do not divide width {dim}; possible are {', '.join(map(str, sorted(best)))}")
    for name in ("lr", "timeout"):
        value = getattr(config, name)
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise CompareError(f"{name} must be a number > 0, got {value!r}")
    if config.match not in ("params", "flops"):
        raise CompareError(f"match must be 'params' or 'flops', got {config.match!r}")
    if config.threads is not None and config.threads < 1:
        raise CompareError(f"threads must be >= 1, got {config.threads!r}")
    if not config.seeds or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in config.seeds):
        raise CompareError(f"seeds must be whole numbers >= 0, got {list(config.seeds)!r}")
    if not config.mechanisms:
        raise CompareError("no mechanisms are named; `regard list` shows all")
    if config.checkpoint and task.name != "text":
        raise CompareError(f"models of the task {task.name} cannot be kept; leave checkpoint out")
    _device(config.device)
    specs, unfit = _mechanisms(config, task)
    return Checked(config, task, specs, unfit)


def plan(checked: Checked) -> list[Cell]:
    """All cells: the first seed of every mechanism, then the second, …"""
    from regard.bench.train import cores, processor
    from regard.models.mixer import parse

    config, specs = checked.config, checked.specs
    settings = {
        **checked.task.settings(),
        "steps": config.steps,
        "batch": config.batch,
        "dim": config.dim,
        "depth": config.depth,
        "heads": config.heads,
        "lr": float(config.lr or 0),
        "match": config.match,
        "device": config.device,
        "processor": processor(),
        "dtype": "float32",
        "threads": config.threads or cores(),
        "torch": version("torch"),
        "code": code_version(),
    }
    own = {spec: {"own code": _own_code(name)} for spec in specs if ":" in (name := parse(spec).name)}
    return [
        Cell(checked.task.name, spec, seed, {**settings, **own.get(spec, {})})
        for seed in dict.fromkeys(config.seeds)
        for spec in specs
    ]


def _task(config: CompareConfig) -> Task:
    try:
        name, options = task_options(config)
        return make(name, options)
    except (TaskError, ImportError) as error:
        raise CompareError(str(error)) from error
    except (ValueError, TypeError) as error:
        raise CompareError(f"task {config.task!r}: {error}") from error


def task_options(config: CompareConfig) -> tuple[str, dict[str, Any]]:
    """The task's name, and its options wherever they stand in the configuration."""
    from regard.models.mixer import parse

    spec = parse(config.task)
    options = dict(spec.options)
    if config.length is not None:
        options["length"] = config.length
    if config.text:
        if find(spec.name).name != "text":
            raise TaskError(f"task {spec.name} brings its own data; leave text out")
        options["text"] = [os.fspath(Path(path).absolute()) for path in config.text]
    return spec.name, options


def _filled(config: CompareConfig, defaults: Defaults) -> CompareConfig:
    names = ("mechanisms", "steps", "batch", "dim", "depth", "heads", "lr")
    return replace(config, **{n: getattr(defaults, n) for n in names if getattr(config, n) is None})


def code_version() -> str:
    """regard's version and a hash of the sources that decide what a cell finds."""
    root = Path(__file__).parent.parent
    silent = re.compile(
        r"((__main__|terminal|doctor|index|cost)\.py|(cli|inspect|steer|integrations|distributed|bench/report)/.*"
        r"|bench/(live|profile\w*|process|store|generate)\.py)"
    )
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not silent.fullmatch(name):
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{version('regard')}+{digest.hexdigest()[:12]}"


def _own_code(name: str) -> str:
    """A hash of the caller's own module, so that editing it makes new cells."""
    found = importlib.util.find_spec(name.partition(":")[0])
    origin = found.origin if found else None
    return hashlib.sha256(Path(origin).read_bytes()).hexdigest()[:12] if origin and os.path.isfile(origin) else "?"


def _mechanisms(config: CompareConfig, task: Task) -> tuple[list[str], dict[str, str]]:
    """Try each mechanism once, so that what cannot work is said now and not after an hour."""
    from regard import catalog
    from regard.bench.fitting import sizes, why_not
    from regard.models.mixer import parse

    size = sizes(task, vars(config))
    specs: list[str] = []
    unfit: dict[str, str] = {}
    for text in config.mechanisms or ():
        if text == ALL:
            for name in catalog.mechanisms():
                reasons = why_not(task, parse(name), size, config.match)
                specs += [] if reasons else [name]
                unfit |= {name: "; ".join(reasons)} if reasons else {}
            continue
        try:
            spec = parse(text)
            if spec.own:
                if os.getcwd() not in sys.path:
                    sys.path.insert(0, os.getcwd())
                task.model(spec, size)
            reasons = why_not(task, spec, size, config.match)
        except (ValueError, TypeError, KeyError) as error:
            said = " ".join(str(error.args[0] if error.args else error).split())
            raise CompareError(said if text.split("(")[0] in said else f"{text}: {said}") from error
        if reasons:
            raise CompareError(f"{text} does not fit the task {task.name}: {'; '.join(reasons)}")
        specs.append(str(spec))
    if not specs:
        raise CompareError(f"no mechanism of the catalogue fits the task {task.name} at this size")
    return list(dict.fromkeys(specs)), unfit


def _device(device: str) -> None:
    import torch

    if device == "cpu":
        return
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise CompareError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    if int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise CompareError(f"device {device!r} is not there; torch sees {torch.cuda.device_count()} GPUs")


def _reusable(store: Store, cell: Cell, config: CompareConfig) -> Result | None:
    result = store.get(cell.key)
    if result is None or (result.status == "failed" and config.retry_failed):
        return None
    if config.checkpoint and result.status == "done" and not (store.folder / (result.checkpoint or "?")).is_file():
        return None
    return result


def _planned(checked: Checked, cells: list[Cell], known: dict[str, Result | None], store: Store) -> Planned:
    others = [result.cell for result in store.results() if result.cell.key not in known]
    mine = cells[0].settings
    differing = {name for cell in others for name in mine if cell.settings.get(name) != mine[name]}
    reused = [result for result in known.values() if result is not None]
    return Planned(checked.task.metric, cells, reused, len(others), sorted(differing), checked.unfit)


def _run(cell: Cell, config: CompareConfig, stop: Stop, on_event: Callable[[Event], None], train: Any) -> Result | None:
    """One cell in its process; None if stopped."""
    name = re.sub(r"[^\w.+-]+", "_", cell.mechanism).strip("._")[:60]
    job = {
        "cell": {
            "task": cell.task,
            "mechanism": cell.mechanism,
            "seed": cell.seed,
            "settings": cell.settings,
        },
        "options": task_options(config)[1],
        "folder": os.fspath(Path(config.out).absolute()),
        "checkpoint": f"checkpoints/{name}-seed{cell.seed}-{cell.key[:8]}.safetensors" if config.checkpoint else "",
    }
    said = train(job, timeout=config.timeout, stop=stop, on_step=lambda step, loss: on_event(Stepped(cell, step, loss)))
    if said is None:
        return None
    if "full" in said:
        raise CompareError(disk_full(Path(config.out) / "checkpoints"))
    if "failed" in said:
        return Result(cell, "failed", reason=said["failed"])
    return Result(cell, **said["result"])


def _report(results: list[Result], folder: Path) -> str:
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


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except (TaskError, StoreError) as error:
        raise CompareError(str(error)) from error
