"""`regard report`: the page of a comparison, written again."""

from pathlib import Path
from typing import Annotated

import typer

from regard import terminal
from regard.cli.group import Command, app


@app.command("report", cls=Command)
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a comparison.")],
    out: Annotated[Path | None, typer.Option(help="The file to write (default: FOLDER/report.html).")] = None,
) -> None:
    """Write the report of a comparison again, from its stored results."""
    from regard.bench.report import write
    from regard.bench.store import read

    path = write(read(folder), folder / "report.html" if out is None else out)
    print(terminal.line(f"report: {path}"))
