"""`regard profile`: time and memory of mechanisms over lengths."""

from typing import TYPE_CHECKING

import typer

from regard.cli.configured import Source, configured

if TYPE_CHECKING:
    from regard.bench.profile import Profile


def _source() -> Source:
    from regard.bench.profile import Profile, lengths

    return Source(Profile, read={"lengths": lengths}, flags={"causal": "--causal/--bidirectional"})


@configured(_source)
def profile(config: "Profile") -> None:
    """Measure time and memory over lengths, a process for each cell, and their growth."""
    from regard.bench.profile_page import command

    raise typer.Exit(command(config))
