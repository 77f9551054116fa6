"""Run the benchmarks, or those named, render docs/benchmarks.md from all figures that are there, and show the goals.

python -m benchmarks [NAME ...] [--render] [--repeats N] [--threads N]

Without names those of the GPU are left out where there is none. --render runs nothing.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.harness import FOLDER, table
from benchmarks.page import GOALS_HEADINGS, records, rendered, summary

PAGE = FOLDER.parent / "benchmarks.md"


def names() -> list[str]:
    """The benchmarks there are: modules of this folder with figures to save."""
    found = sorted(path for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != "harness")
    return [p.stem for p in found if any(word in p.read_text(encoding="utf-8") for word in ("command(", "finish("))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names()))
    parser.add_argument("--render", action="store_true", help="only write the page from the figures there are")
    for option in ("--repeats", "--threads"):
        parser.add_argument(option, type=int, help="as of each benchmark")
    args = parser.parse_args()
    if unknown := set(args.names) - set(names()):
        sys.exit(f"unknown benchmark {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    asked = args.names or [n for n in names() if not n.startswith("gpu") or torch.cuda.is_available()]
    passed = [f"--{key}={n}" for key in ("repeats", "threads") if (n := getattr(args, key))]
    failed = [] if args.render else [n for n in asked if not ran(n, passed, asked)]
    found = records()
    PAGE.write_text(rendered(found), encoding="utf-8")
    Console(width=100).print(table("Goals", GOALS_HEADINGS, summary(found)))
    print(f"{PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE} is written")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


def ran(name: str, options: list[str], among: list[str]) -> bool:
    """Run one in a process of its own, and save its figures; whether it ended well."""
    print(f"[{among.index(name) + 1}/{len(among)}] {name}", flush=True)
    began = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--save", *options]).returncode
    print(f"{name}: {'done' if code == 0 else 'failed'} after {time.perf_counter() - began:.0f} s\n", flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
