"""Fill the parts of README.md that come from commands; with --check, only say whether one is old.

A part begins with `<!-- run: COMMAND -->` and ends with `<!-- end -->`; the command is `regard ...` or
`python tools/...`. What it puts out is shown as in a terminal, unless it is a Markdown table.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PART = re.compile(r"(<!-- run: (\w[^\n]*) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, run: Callable[[str], str]) -> str:
    """`text` with every part made anew; `run` gives a command's output."""

    def fill(part: re.Match[str]) -> str:
        command, output = part[2], run(part[2]).rstrip("\n")
        if not output.startswith("|"):  # a table
            output = f"```console\n$ {command}\n{output}\n```"
        return f"{part[1]}{output}\n{part[3]}"

    return PART.sub(fill, text)


def run(command: str) -> str:
    """The output of a command at 100 columns."""
    program, *rest = shlex.split(command)
    arguments = [sys.executable, *rest] if program == "python" else [sys.executable, "-m", program, *rest]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    done = subprocess.run(arguments, env=environment, cwd=ROOT, check=True, capture_output=True, encoding="utf-8")
    return done.stdout


if __name__ == "__main__":
    old = README.read_text(encoding="utf-8")
    new = filled(old, run)
    if "--check" in sys.argv:
        sys.exit("README.md is old: run `python tools/readme.py`" if new != old else 0)
    README.write_text(new, encoding="utf-8")
