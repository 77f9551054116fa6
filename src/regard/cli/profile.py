"""`regard profile`: time and memory of mechanisms over lengths."""

from typing import Any

import typer

from regard.cli.configured import Source, configured


def _source() -> Source:
    from regard.bench.profile import Profile, lengths

    return Source(Profile, read={"lengths": lengths}, flags={"causal": "--causal/--bidirectional"})


@configured(_source)
def profile(config: Any) -> None:
    """Measure time and memory over lengths, and how they grow.

    Each cell, a mechanism at a length, has a process of its own.
    """
    from regard.bench.profile_page import command

    raise typer.Exit(command(config))
