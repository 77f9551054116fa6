"""`regard explain`: a page of what a model attends to."""

from pathlib import Path
from typing import Annotated

import typer

from regard import terminal
from regard.cli.arguments import integers
from regard.cli.group import Command, app


@app.command("explain", cls=Command)
def explain(
    text: Annotated[str | None, typer.Option(help="What the model reads.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_DIR",
            help="A transformers model, or one of compare --checkpoint (default: the newest of these in runs).",
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="What the model sees.")] = None,
    layers: Annotated[str | None, typer.Option(help="Only these layers, with commas between, e.g. 0,5.")] = None,
    swap: Annotated[
        str | None, typer.Option(metavar="MECHANISM", help="Show the model with this attention beside its own.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("attention.html"),
) -> None:
    """Write a page of what a model attends to, every layer and head."""
    from regard.inspect.explain import explain as explained

    chosen = None if layers is None else integers("layers", layers)
    explained(
        text, model=model, image=image, layers=chosen, swap=swap, out=out, say=lambda words: print(terminal.line(words))
    )
