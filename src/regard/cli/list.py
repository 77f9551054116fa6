"""`regard list`: the mechanisms in a table, from the generated catalogue."""

from typing import Annotated

import typer

from regard import index, terminal
from regard.cli import table
from regard.cli.arguments import AsJson, print_json
from regard.cli.group import Command, app


@app.command("list", cls=Command)
def list_(
    family: Annotated[str | None, typer.Option(help="Only this family, e.g. positions.")] = None,
    task: Annotated[str | None, typer.Option(help="Show which can do this task of compare, and why not.")] = None,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """List the mechanisms."""
    found = index.entries(family)
    if task is not None:
        if markdown:
            raise ValueError("list: the Markdown table has no column for a task; leave --markdown or --task out")
        _fits([entry for entry in found if entry["form"] != "function"], task, as_json)
    elif as_json:
        print_json(found)
    elif markdown:
        print(table.markdown(found))
    else:
        print("\n".join([*table.table(found), ""]))
        for text in (*table.legend(found), table.count(found, families=family is None)):
            print("\n".join(terminal.wrapped(text)))


def _fits(found: list[index.Entry], task: str, as_json: bool) -> None:
    """Which of them can do the task at the task's own size, and why the others cannot."""
    from regard import tasks
    from regard.bench.fitting import sizes, why_not
    from regard.spec import parse, single

    asked = single(task, "task")
    made = tasks.make(asked.name, asked.options)
    reasons = {entry["name"]: why_not(made, parse(entry["name"]), sizes(made)) for entry in found}
    if as_json:
        print_json([{**entry, "why_not": reasons[entry["name"]]} for entry in found])
        return
    columns = (
        terminal.Column("name"),
        terminal.Column("family", rank=1),
        terminal.Column("fits"),
        terminal.Column("why not", least=24),
    )
    rows = [
        (entry["name"], entry["family"], "no" if (why := reasons[entry["name"]]) else "yes", "; ".join(why))
        for entry in found
    ]
    print("\n".join([*terminal.joined(terminal.fitted(columns, rows)), ""]))
    fit = sum(not why for why in reasons.values())
    print("\n".join(terminal.wrapped(terminal.line(f"{fit} of {len(found)} mechanisms can do the task {task}"))))
