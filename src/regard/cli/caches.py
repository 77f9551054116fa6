"""`regard caches`: what a model still gets right with caches that keep less."""

from typing import Any

import typer

from regard.cli.configured import Source, configured


def _source() -> Source:
    from regard.bench.caches import Caches, budgets
    from regard.bench.profile import lengths

    return Source(Caches, read={"budget": budgets, "lengths": lengths}, arguments=frozenset({"model"}))


@configured(_source)
def caches(config: Any) -> None:
    """Ask a model questions with caches that keep less.

    Exit code: 0 all done, 3 some cells failed, 130 or 143 stopped (the same command goes on).
    """
    from regard.bench.caches_page import command

    raise typer.Exit(command(config))
