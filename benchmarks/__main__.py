"""Run the benchmarks, or those named, and render docs/benchmarks.md from all figures that are there.

python -m benchmarks [NAME ...] [--render]
"""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import FOLDER, Figure, cells

PAGE = FOLDER.parent / "benchmarks.md"
HEAD = """# Benchmarks

Made by `make bench`; `python -m benchmarks NAME` runs one anew. Regard and its peer run in turns in one process, after
their results have been found to agree. Ratios are medians over the rounds, with the least and the greatest.
"""


def names() -> list[str]:
    """The benchmarks there are: modules of this folder with figures to save."""
    found = sorted(path for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != "harness")
    return [path.stem for path in found if "finish(" in path.read_text()]


def rendered() -> str:
    """The page, from the JSON of every benchmark that has been run."""
    parts = [HEAD]
    for path in sorted(FOLDER.glob("*.json")):
        record = json.loads(path.read_text())
        on = ", ".join(f"{k} {v}" if k != "device" else v for k, v in record["machine"].items())
        lines = ["| what | measured | spread | goal | |", "|---|---|---|---|---|"]
        for figure in record["figures"]:
            figure.pop("met")
            lines.append("| " + " | ".join(cells(Figure(**figure))) + " |")
        parts.append(
            f"## {record['about']}\n\n`python -m benchmarks.{path.stem}` on {on}.\n\n" + "\n".join(lines) + "\n"
        )
    return "\n".join(parts)


def main() -> int:
    asked = [a for a in sys.argv[1:] if not a.startswith("-")]
    if unknown := set(asked) - set(names()):
        sys.exit(f"unknown benchmark {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    failed = []
    if "--render" not in sys.argv:
        for name in asked or names():
            print(f"== {name}", flush=True)
            if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--save"]).returncode:
                failed.append(name)
    PAGE.write_text(rendered(), encoding="utf-8")
    print(f"{PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE} is written")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
