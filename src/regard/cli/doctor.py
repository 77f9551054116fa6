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

    from regard.doctor import examine

    findings = examine()
    if as_json:
        print_json([asdict(finding) for finding in findings])
        return
    columns = (terminal.Column(""), terminal.Column(""), terminal.Column("", least=24))
    marks = {"ok": "ok", "no": "no", "fact": ""}
    rows = [(finding.name, marks[finding.state], finding.text) for finding in findings]
    lines = iter(terminal.joined(terminal.fitted(columns, rows, terminal.width() - 2))[1:])
    style = {"ok": "green", "no": "yellow", "fact": None}
    for topic, some in groupby(findings, key=lambda finding: finding.topic):
        terminal.show(topic, style="bold")
        for finding in some:
            terminal.show(f"  {next(lines)}", style=style[finding.state])
