"""`regard doctor`: what this machine offers and lacks."""

from regard import terminal
from regard.cli.arguments import AsJson, print_json
from regard.cli.group import Command, app


@app.command("doctor", cls=Command)
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine offers and what it lacks, and what for.

    Versions, devices, kernels that really run, extras and what is missing of them, the compiler, the folder.
    """
    from dataclasses import asdict
    from itertools import groupby

    from rich.text import Text

    from regard.doctor import examine

    findings = examine()
    if as_json:
        print_json([asdict(finding) for finding in findings])
        return
    indent = max(len(finding.name) for finding in findings) + 2
    style = {"ok": "green", "no": "yellow", "fact": None}
    for topic, some in groupby(findings, key=lambda finding: finding.topic):
        grid = terminal.grid(indent, 2, 0)
        for finding in some:
            mark = "" if finding.state == "fact" else finding.state
            grid.add_row(f"  {finding.name}", mark, terminal.line(finding.text), style=style[finding.state])
        terminal.show(Text(topic, "bold"), grid)
