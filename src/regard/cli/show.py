"""`regard show`: all that is known about one mechanism."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from regard import index, terminal
from regard.cli.arguments import AsJson, print_json
from regard.cli.group import Command, app
from regard.files import write_atomically


@app.command("show", cls=Command)
def show(
    mechanism: Annotated[str, typer.Argument(metavar="NAME", help="A name, or 'window(window=8)' with options.")],
    length: Annotated[int, typer.Option(min=1, help="T = S, tokens, for the numbers of the cost.")] = 1024,
    heads: Annotated[int, typer.Option(min=1, help="H = G, heads, likewise.")] = 8,
    width: Annotated[int, typer.Option(min=1, help="D = V, the width of a head, likewise.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="B, sequences, likewise.")] = 1,
    svg: Annotated[Path | None, typer.Option(help="Write a picture of what a query may see to this file.")] = None,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Show all about one mechanism: equation, papers, cost, picture."""
    from regard.spec import parse

    spec = parse(mechanism)
    for name in spec.names:
        if known := index.find(name):
            import_module(known["where"].rpartition(".")[0])  # this file alone, instead of all
    from regard import catalog
    from regard.cli import page, picture
    from regard.cost import costs

    parts = [(catalog.card(part.name), part.options) for part in spec.parts]
    module = picture.small([card for card, _ in parts], spec)
    costed = [costs(card, own, batch=batch, heads=heads, length=length, width=width) for card, own in parts]
    if svg is not None:
        field = picture.field(module)
        if field is None:
            raise ValueError(f"show: {spec.name} has no mask that could be drawn; leave --svg out")
        write_atomically(svg, field.svg())
    if as_json:
        entries = [index.data(card) for card, _ in parts]
        told = [{**entry, "cost": {**entry["cost"], "numbers": cost}} for entry, cost in zip(entries, costed)]
        print_json(told[0] if len(told) == 1 else told)
        return
    for n, ((card, own), cost) in enumerate(zip(parts, costed), 1):
        # The picture is that of the whole, below the last of its parts.
        found = list(page.sections(card, own, cost, picture.picture(module) if n == len(parts) else ()))
        if n > 1:
            print()
        if markdown:
            print(page.markdown(card, found))
        else:
            page.show(card, found)
    if markdown:
        return
    if svg is not None:
        print(terminal.line(f"\npicture: {svg}"))
