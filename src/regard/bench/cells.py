"""The cells of a comparison: one for each mechanism and seed, with everything that decides what it finds."""

from importlib.metadata import version
from typing import Any

from regard import catalog
from regard.bench.closure import Closures
from regard.bench.config import Checked
from regard.bench.machine import processor, threads_for
from regard.bench.record import Cell
from regard.models.mixer import Mechanism, parse, parse_stack
from regard.tasks import Task

TRAINER = "regard.bench.worker"
"""What trains and measures a cell."""


def plan(checked: Checked) -> list[Cell]:
    """All cells: the first seed of every mechanism, then the second, …"""
    common, code = settings(checked), codes(checked.task, checked.specs)
    return [
        Cell(checked.task.name, spec, seed, {**common, "code": code[spec]})
        for seed in dict.fromkeys(checked.config.seeds)
        for spec in checked.specs
    ]


def settings(checked: Checked) -> dict[str, Any]:
    """What all cells share."""
    config = checked.config
    return {
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
        "threads": config.threads or threads_for((config.batch or 1) * checked.task.tokens * (config.dim or 1)),
        "torch": version("torch"),
    }


def codes(task: Task, specs: list[str]) -> dict[str, str]:
    """Mechanism -> a hash of the code that decides its cells; no other code makes them stale."""
    modules = {spec: deciding(task, parse_stack(spec)) for spec in specs}
    tops = {module.partition(".")[0] for some in modules.values() for module in some}
    closures = Closures(packages=tops, module_of=module_of)
    return {spec: closures.digest(some)[:12] for spec, some in modules.items()}


def deciding(task: Task, mechanism: Mechanism) -> list[str]:
    """The modules that decide a cell, with all that they import.

    The task's names the host model; the trainer reaches the catalogue, which builds, and the kernels. The baseline is
    among them, as its size is what the others are matched to.
    """
    return [TRAINER, type(task).__module__, *modules_of(parse(task.baseline)), *modules_of(mechanism)]


def modules_of(mechanism: Mechanism) -> list[str]:
    """The modules that hold a mechanism: one for each card in it, and the caller's own."""
    return [
        name.partition(":")[0] if ":" in name else catalog.card(name).builder.__module__ for name in mechanism.names
    ]


def module_of(name: str) -> str | None:
    card = catalog.cards().get(name)
    return None if card is None else card.builder.__module__
