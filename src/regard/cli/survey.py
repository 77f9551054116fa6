"""`regard survey`: what a survey of efficient attention covers, what of it is here, and how that measures."""

from pathlib import Path
from typing import Annotated

import typer

from regard import terminal
from regard.cli.arguments import AsJson, integers, print_json
from regard.cli.group import Command, app


@app.command("survey", cls=Command)
def survey(
    name: Annotated[str, typer.Argument(metavar="practical|efficient|llm", help="Which survey.")],
    measure: Annotated[bool, typer.Option("--measure", help="Profile and train what is built.")] = False,
    only: Annotated[str, typer.Option(help="Only classes with this in their name, e.g. 'low rank'.")] = "",
    lengths: Annotated[str, typer.Option(help="Tokens to profile at: 1k..32k doubles.")] = "1k..8k",
    dim: Annotated[int, typer.Option(min=1, help="M, the model width there.")] = 256,
    heads: Annotated[int, typer.Option(min=1, help="H, the heads there.")] = 4,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of a cell (default: the task's).")] = None,
    seeds: Annotated[str, typer.Option(help="Training runs of each, with commas between.")] = "0,1,2",
    limit: Annotated[float, typer.Option(min=1, help="Seconds for one mechanism at one length.")] = 60.0,
    out: Annotated[Path, typer.Option(help="Folder of the results; training resumes there.")] = Path("runs/survey"),
    as_json: AsJson = False,
) -> None:
    """Show what a survey covers and what of it is built.

    Times and memory grow as T^e; `faster from` is the length from which it takes less time than softmax attention.
    """
    from regard.bench import surveys

    asked, found = surveys.survey(name), surveys.rows(name, only)
    if not measure:
        if as_json:
            print_json(
                [
                    {"class": r.kind, "method": r.method.name, "paper": r.method.paper, "free": r.method.free,
                     "mechanism": r.card and r.card["name"]}
                    for r in found
                ]
            )  # fmt: skip
            return
        from regard.bench.surveying import table

        print("\n".join([*terminal.wrapped(asked.cited), "", *table(found), ""]))
        built = {(r.kind, r.method.name) for r in found if r.card is not None}
        every = {(r.kind, r.method.name) for r in found}
        print(
            "\n".join(terminal.wrapped(f"{len(built)} of {len(every)} methods are built. * for models trained without"))
        )
        return
    from regard.bench import profile, surveying

    config = surveying.Measuring(profile.lengths(lengths), dim, heads, limit, steps, integers("seeds", seeds), out)
    screen = terminal.console(stderr=True)
    with screen.status("measuring") as status:

        def say(words: str) -> None:
            if screen.is_terminal:
                status.update(terminal.line(words))
            else:
                screen.print(terminal.line(words), markup=False, highlight=False)

        try:
            measured = surveying.measure(name, only, config, say=say)
        except surveying.Stopped as stopped:
            print("stopped; the same command goes on with the training")
            raise typer.Exit(128 + stopped.args[0]) from None
    if as_json:
        from dataclasses import asdict

        print_json([asdict(one) for one in measured])
        return
    print("\n".join([*terminal.wrapped(asked.cited), "", *surveying.measured(measured)]))
    print("\n".join(terminal.wrapped(terminal.line(f"results: {out / 'survey.json'}"))))
