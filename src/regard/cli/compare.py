"""`regard compare`: train mechanisms on the same task at equal budget."""

from typing import Any

import typer

from regard import index
from regard.cli.configured import Source, configured


def _source() -> Source:
    from regard.bench.config import CompareConfig

    tasks = index.tasks()
    first = next(iter(tasks.values()))
    told = {**first["defaults"], "length": first["options"].get("length")}
    return Source(
        CompareConfig,
        defaults={
            name: f"{', '.join(value) if isinstance(value, list) else value} for {first['name']}"
            for name, value in told.items()
        },
        words={"task": f"There are {', '.join(tasks)}."},
    )


@configured(_source)
def compare(config: Any) -> None:
    """Train mechanisms at equal budget; print a table, write a report.

    Exit code: 0 all done, 3 some cells failed, 130 or 143 stopped (the same command goes on).
    """
    from regard.bench.compare import run

    raise typer.Exit(run(config))
