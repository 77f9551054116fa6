"""Fill the parts of README.md that come from commands; with --check, only say whether one is old.

A part begins with `<!-- run: regard ... -->` and ends with `<!-- end -->`.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
PART = re.compile(r"(<!-- run: (regard [^\n]*) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, run: Callable[[str], str]) -> str:
    """`text` with every part made anew; `run` gives a command's output."""

    def fill(part: re.Match[str]) -> str:
        command, output = part[2], run(part[2]).rstrip("\n")
        if "--markdown" not in command:
            output = f"```console\n$ {command}\n{output}\n```"
        return f"{part[1]}{output}\n{part[3]}"

    return PART.sub(fill, text)


def run(command: str) -> str:
    """The output of a regard command at 100 columns."""
    arguments = [sys.executable, "-m", *command.replace("'", "").split()]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(arguments, env=environment, check=True, capture_output=True, encoding="utf-8").stdout


if __name__ == "__main__":
    old = README.read_text(encoding="utf-8")
    new = filled(old, run)
    if "--check" in sys.argv:
        sys.exit("README.md is old: run `python tools/readme.py`" if new != old else 0)
    README.write_text(new, encoding="utf-8")
