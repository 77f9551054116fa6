"""The rooms of the package: their order, which hold mechanisms, and how they open.

A room may import from those before it and from its own files. `tests/test_rooms.py` holds the code to that.
"""

import importlib
import pkgutil
import sys
import threading
from collections.abc import Callable
from typing import Any

ORDER: tuple[tuple[str, ...], ...] = (
    ("rooms", "checks", "spec", "terminal", "files"),
    ("shapes", "weights", "cards", "kinds", "cost", "tracing", "rules"),
    ("masks",),
    ("stages", "slots", "pairwise"),
    ("kernels",),
    ("scores", "positions", "normalizers", "heads"),
    ("pipeline",),
    ("routing",),
    ("linear", "mixers", "cross", "recurrent", "vision", "detection", "graph", "timeseries"),
    ("cache", "distributed", "training"),
    ("catalog", "index"),
    ("laws",),
    ("models",),
    ("integrations",),
    ("inspect",),
    ("steer",),
    ("tasks", "prompts"),
    ("bench",),
    ("doctor", "cli"),
)
"""From the ground up; what stands in one tuple is on one floor, and may use each other."""

FAMILIES = (
    "masks",
    "kernels",
    "scores",
    "positions",
    "normalizers",
    "heads",
    "routing",
    "linear",
    "mixers",
    "cross",
    "recurrent",
    "vision",
    "detection",
    "graph",
    "timeseries",
    "cache",
    "distributed",
    "training",
    "models",
    "inspect",
    "steer",
)
"""The rooms that may hold cards."""


FIRST = threading.RLock()
"""Held while a name of `regard` is imported for the first time: of threads that ask at once, Python would hand some a
module that is half made. No file of regard asks for such a name while it is imported, so that nobody waits for ever."""


def opened(room: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for a room's `__init__`: what its files define is found there, when asked for.

    A name that is a file of the room is that file, never something in it.
    """

    def found() -> dict[str, Any]:
        package = sys.modules[room]
        named: dict[str, Any] = {}
        for _, path, _ in pkgutil.iter_modules(package.__path__):
            if not path.startswith("_"):
                module = importlib.import_module(f"{room}.{path}")
                own = (n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__)
                named |= {name: getattr(module, name) for name in own if not name.startswith("_")}
        return named

    def getattr_(name: str) -> Any:
        if name == "__all__":  # what a star import asks for
            return sorted(found())
        if name.startswith("_"):
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        if any(path == name for _, path, _ in pkgutil.iter_modules(sys.modules[room].__path__)):
            return importlib.import_module(f"{room}.{name}")
        if name not in (named := found()):
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return named[name]

    def dir_() -> list[str]:
        return sorted({*vars(sys.modules[room]), *found()} - {"opened"})

    return getattr_, dir_
