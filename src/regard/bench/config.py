"""What `regard compare` is asked to do, and whether it can be done."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from regard import tasks
from regard.bench.machine import check_device
from regard.bench.process import answer, tried
from regard.bench.record import Match
from regard.checks import choice, number, refuse, whole
from regard.models.mixer import Mechanism, find, look_here, parse, parse_stack
from regard.spec import single
from regard.tasks import Size, Task, TaskError, make

ALL = "all"
"""Among mechanisms: every one of the catalogue that the task can be done with."""


class CompareError(ValueError):
    """The comparison cannot be done as asked; the message is one line."""


@dataclass(frozen=True)
class CompareConfig:
    """What `regard compare` is asked to do."""

    task: str = "text"
    """A name of `regard.tasks`, with options in brackets: 'mqar(pairs=(4, 8))'."""
    mechanisms: Sequence[str] | None = None
    """Names, with options in brackets: 'window(window=64)'; also 'gated+rotary', own 'module:callable', and 'all';
    'linear*3+softmax' repeats three linear layers and one of softmax down the model, for a depth of 4, 8, ...

    None, here and below: what the task has by default."""
    text: Sequence[str | Path] = ()
    """A file or folder, for the task `text`; none = the standard library's sources and docs."""
    seeds: Sequence[int] = (0, 1, 2)
    """Each mechanism is trained once with each; from two on a test can say who is told apart."""
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
    """CPU threads of a cell; none given = one for each 65,536 numbers of an activation, at most all cores."""
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
    others: Sequence[str] = ()
    """A line for each of the catalogue's that is another mechanism at this size."""


def validate(config: CompareConfig, ask: Any = answer) -> Checked:
    """Refuse what cannot work before any work is done. Raises CompareError.

    Args:
        ask: runs one job; for tests.
    """
    with one_line(ValueError, ImportError):
        task = make(*task_options(config))
    config = _filled(config, task)
    with one_line(ValueError, TypeError):
        _check_numbers(config)
        _check_choices(config, task)
        check_device("compare", config.device)
    specs, unfit = _mechanisms(config, task)
    _try_own(specs, config, task, ask)
    return Checked(config, task, specs, unfit, _others(config, task, specs))


@contextlib.contextmanager
def one_line(*errors: type[Exception]) -> Iterator[None]:
    """Errors of these kinds, which say in one line what is wrong, become CompareErrors."""
    try:
        yield
    except errors as error:
        raise CompareError(str(error)) from error


def task_options(config: CompareConfig) -> tuple[str, dict[str, Any]]:
    """The task's name, and its options wherever they stand in the configuration."""
    spec = single(config.task, "task")
    options = dict(spec.options)
    if config.length is not None:
        options["length"] = config.length
    if config.text:
        if tasks.find(spec.name).name != "text":
            raise TaskError(f"task {spec.name} brings its own data; leave text out")
        options["text"] = [os.fspath(Path(path).absolute()) for path in config.text]
    return spec.name, options


def _filled(config: CompareConfig, task: Task) -> CompareConfig:
    """The task's defaults wherever nothing is asked for."""
    names = ("steps", "batch", "dim", "depth", "heads", "lr")
    defaults = {name: getattr(task.defaults, name) for name in names if getattr(config, name) is None}
    mechanisms = task.mechanisms() if config.mechanisms is None else config.mechanisms
    return replace(config, mechanisms=mechanisms, **defaults)


def _check_numbers(config: CompareConfig) -> None:
    for name in ("steps", "batch", "dim", "depth", "heads"):
        whole("compare", **{name: getattr(config, name)})
    for seed in config.seeds:
        whole("compare", 0, seeds=seed)
    if config.threads is not None:
        whole("compare", threads=config.threads)
    number("compare", above=0, lr=config.lr, timeout=config.timeout)
    dim, heads = config.dim or 1, config.heads or 1
    if dim % heads:
        near = sorted((n for n in range(1, dim + 1) if dim % n == 0), key=lambda n: abs(n - heads))[:3]
        refuse("compare", "heads", f"do not divide dim = {dim}", heads, f"such as {', '.join(map(str, sorted(near)))}")


def _check_choices(config: CompareConfig, task: Task) -> None:
    choice("compare", ("params", "flops"), match=config.match)
    if not config.seeds:
        refuse("compare", "seeds", "are missing", tuple(config.seeds), "at least one")
    if not config.mechanisms:
        raise CompareError("no mechanisms are named; `regard list` shows all")
    if config.checkpoint and not task.keeps_models:
        raise CompareError(f"models of the task {task.name} cannot be kept; leave checkpoint out")


def _mechanisms(config: CompareConfig, task: Task) -> tuple[list[str], dict[str, str]]:
    """Try each mechanism once, so that what cannot work is said now and not after an hour.

    Returns those that can, spelled out, and of those that stand for 'all' the unfit ones -> why.
    """
    from regard import catalog
    from regard.bench.fitting import why_not
    from regard.bench.match import sizes

    size = sizes(task, vars(config))
    specs: list[str] = []
    unfit: dict[str, str] = {}
    for text in config.mechanisms or ():
        if text != ALL:
            specs.append(str(_fitting(text, config, task, size)))
            continue
        reasons = {name: why_not(task, parse(name), size, config.match) for name in catalog.mechanisms()}
        specs += [name for name, why in reasons.items() if not why]
        unfit |= {name: "; ".join(why) for name, why in reasons.items() if why}
    if not specs:
        raise CompareError(f"no mechanism of the catalogue fits the task {task.name} at this size")
    return list(dict.fromkeys(specs)), unfit


def _try_own(specs: Sequence[str], config: CompareConfig, task: Task, ask: Any) -> None:
    """Build the caller's own once, in a process of its own: whatever happens there."""
    own = [spec for spec in specs if parse_stack(spec).own]
    settings = {"threads": 1, "dim": config.dim, "depth": config.depth, "heads": config.heads}
    cell = {"task": task.name, "mechanism": task.baseline, "seed": 0, "settings": settings}
    job = {"cell": cell, "options": task_options(config)[1], "checkpoint": ""}
    for name, why in tried(own, job, timeout=config.timeout, ask=ask).items():
        raise CompareError(_naming(name, why))


def _others(config: CompareConfig, task: Task, specs: Sequence[str]) -> list[str]:
    """What is to be said of mechanisms that are others at this size. The caller's own run in workers alone."""
    import torch

    from regard.bench.match import sizes
    from regard.bench.probing import another

    size, found = sizes(task, vars(config)), []
    with torch.random.fork_rng(devices=[]):
        for mechanism in map(parse_stack, specs):
            found.append(mechanism.cut(size.depth))
            if not mechanism.own:
                found.append(another(task.model(mechanism, size), task, mechanism, torch.device("cpu")))
    return list(filter(None, found))


def _fitting(text: str, config: CompareConfig, task: Task, size: Size) -> Mechanism:
    """The mechanism of that name. Raises CompareError if the task cannot be done with it."""
    from regard.bench.fitting import why_not

    try:
        mechanism = parse_stack(text)
        for spec in mechanism.kinds:
            if spec.own:
                look_here()
                find(spec)
        reasons = why_not(task, mechanism, size, config.match)
    except (ValueError, TypeError, KeyError) as error:
        said = " ".join(str(error.args[0] if error.args else error).split())
        raise CompareError(_naming(text, said)) from error
    if reasons:
        raise CompareError(f"{text} does not fit the task {task.name}: {'; '.join(reasons)}")
    return mechanism


def _naming(mechanism: str, said: str) -> str:
    """What is said of a mechanism, which it names."""
    return said if mechanism.lstrip("( ").partition("(")[0] in said else f"{mechanism}: {said}"
