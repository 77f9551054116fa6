"""`regard check`: put an attention, of the catalogue or anybody's, through the laws."""

from typing import Annotated

import typer

from regard import terminal
from regard.cli.arguments import AsJson, print_json
from regard.cli.group import Command, app


@app.command("check", cls=Command)
def check(
    thing: Annotated[str, typer.Argument(metavar="THING", help="package.module:Thing, or a mechanism's name.")],
    protocol: Annotated[str | None, typer.Option(help="What it takes and gives (default: TokenMixer).")] = None,
    supports: Annotated[
        str | None, typer.Option(help="What it can do, with commas between (default: what its signatures say).")
    ] = None,
    traits: Annotated[str, typer.Option(help="Properties that it claims, with commas between.")] = "",
    dim: Annotated[int | None, typer.Option(min=1, help="M, the width (default: 24).")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="H, heads (default: 6).")] = None,
    options: Annotated[str, typer.Option(help="To build it with, as 'rank=4, bias=False'.")] = "",
    law: Annotated[str, typer.Option(help="Only these laws, by id or name, with commas between.")] = "",
    long: Annotated[bool, typer.Option("--long", help="Also compile and export it, and long inputs: minutes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check an attention law by law: holds, fails, or does not apply. Exit code 1 if one fails.

    A class gets its sizes as dim or embed_dim, num_heads and so on; forward is called with (x[, context]) or with
    (query, key, value), a function with (q, k, v). Masks: mask and attn_mask, bool, True = may attend;
    key_padding_mask as in torch.
    """
    import os
    import sys

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where the caller's own module most likely is
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from regard.laws import check as run
    from regard.laws.checking import Finding, chosen
    from regard.models.mixer import parse

    asked = words(law) or None
    screen = terminal.console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )
    with bars:
        task = bars.add_task("laws", total=len(chosen(asked, long)))

        def seen(finding: Finding) -> None:
            bars.update(task, advance=1, description=str(finding.law))

        report = run(
            thing,
            protocol=protocol,
            supports=None if supports is None else words(supports),
            traits=words(traits) or None,
            dim=dim,
            heads=heads,
            options=parse(f"options({options})", "options").options,
            laws=asked,
            long=long,
            seen=seen,
        )
    if as_json:
        print_json(report.data())
    else:
        from rich.text import Text

        style = {"holds": "green", "fails": "bold red", "excepted": "yellow", "does not apply": "dim"}
        grid = terminal.grid(5, 0, 0)
        for finding in report.findings:
            outcome = "n/a" if finding.outcome == "does not apply" else finding.outcome
            name = finding.law.name.replace("_", " ")
            said = name if finding.outcome == "holds" else f"{name}: {finding.text}"
            grid.add_row(finding.law.id, Text(outcome, style[finding.outcome]), terminal.line(said))
        terminal.show(grid)
        terminal.show(terminal.line(f"looked at as {', '.join((*report.supports, *report.traits))}"))
        terminal.show(terminal.line(report.summary()), style="bold")
    if not report.ok:
        raise typer.Exit(1)


def words(given: str) -> list[str]:
    return [word.strip() for word in given.split(",") if word.strip()]
