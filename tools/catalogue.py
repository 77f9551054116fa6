"""Write src/regard/catalogue.json, which lists and help read instead of importing every mechanism.

With --check, only say whether it is old.
"""

import sys
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

from regard import catalog, index, tasks


def text() -> str:
    """What the file should hold: a line for each card, sorted by name, and one for each task."""
    cards = (index.data(card) for _, card in sorted(catalog.cards().items()))
    return f'{{"cards": [\n{_lines(cards)}\n],\n"tasks": [\n{_lines(map(task, tasks.names()))}\n]}}\n'


def task(name: str) -> dict[str, Any]:
    """What help and lists need of a task."""
    found = tasks.find(name)
    return {
        "name": name,
        "gist": found.gist,
        "takes": {protocol: sorted(features) for protocol, features in sorted(found.takes.items())},
        "options": {f.name: index.literal(f.default) for f in fields(found) if f.init},
        "defaults": {**asdict(found.defaults), "mechanisms": list(found.mechanisms())},
    }


def _lines(entries: Iterable[dict[str, Any]]) -> str:
    return ",\n".join(map(index.line, entries))


if __name__ == "__main__":
    new = text()
    if "--check" in sys.argv:
        old = index.FILE.read_text(encoding="utf-8") if index.FILE.exists() else ""
        sys.exit("src/regard/catalogue.json is old: run `python tools/catalogue.py`" if new != old else 0)
    index.FILE.write_text(new, encoding="utf-8")
