"""`regard show`: all that is known about one mechanism."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from regard import index, terminal
from regard.cli.arguments import AsJson, print_json
from regard.cli.group import Command, app


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
    from regard.models.mixer import parse

    spec = parse(mechanism)
    if "+" in spec.name:
        raise ValueError(f"show: {spec.name!r} joins several mechanisms; show them one by one")
    if known := index.find(spec.name):
        import_module(known["where"].rpartition(".")[0])  # this file alone, instead of all
    from regard import catalog
    from regard.cli import page, picture
    from regard.cost import costs

    card = catalog.card(spec.name)
    module = picture.small(card, spec.options)
    cost = costs(card, spec.options, batch=batch, heads=heads, length=length, width=width)
    if svg is not None:
        field = picture.field(module)
        if field is None:
            raise ValueError(f"show: {card.name} has no mask that could be drawn; leave --svg out")
        svg.write_text(field.svg(), encoding="utf-8")
    if as_json:
        entry = index.data(card)
        print_json({**entry, "cost": {**entry["cost"], "numbers": cost}})
        return
    found = list(page.sections(card, spec.options, cost, picture.picture(module)))
    if markdown:
        print(page.markdown(card, found))
        return
    page.show(card, found)
    if svg is not None:
        print(terminal.line(f"\npicture: {svg}"))
