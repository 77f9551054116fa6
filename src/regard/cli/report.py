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
    from regard.bench.store import FILE, read
    from regard.files import naming

    results = read(folder)
    try:
        path = write(results, folder / "report.html" if out is None else out)
    except (OSError, ImportError):
        raise
    except Exception as error:  # what results of no run may lead to can't be listed
        with naming(folder / FILE):
            raise ValueError(f"its results make no report: {type(error).__name__}: {error}") from error
    print(terminal.line(f"report: {path}"))
