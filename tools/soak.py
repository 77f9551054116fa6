"""Kills `regard compare` at random moments, resumes it, and holds its rows against those of an undisturbed run.

    python tools/soak.py                    25 kills, by SIGKILL, SIGTERM and SIGINT, of the run or of a cell's worker
    python tools/soak.py --kills 5 --seed 7

What must be equal bit by bit is all but seconds, speeds and peak memory, in the store and in the models that are kept.
No process may outlive its run, and no traceback may be shown. It looks into /proc, so it needs Linux.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open

from regard.bench.store import StoreError, read

MEASURED = {"seconds", "peak_memory_bytes", "turns"} | {
    f"{what}_{of}" for what in ("train", "generate") for of in ("tokens_per_second", "spread")
}
"""Fields that no two runs share."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
DONE = (0, 3)
"""Exit codes of a run that came to its end; 3 with cells that failed, as those whose worker was killed do."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    asked = parser.parse_args()
    print(f"seed {asked.seed}, {asked.kills} kills")
    draw, kinds = random.Random(asked.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "book.txt").write_text("a text that nobody wrote, line by line\n" * 200)
        began = time.monotonic()
        if (code := start(folder, "undisturbed").wait()) != 0:
            return wrong(f"the undisturbed run ended with exit code {code}")
        whole, expected = time.monotonic() - began, rows(folder / "undisturbed")
        print(f"undisturbed: {len(expected)} cells in {whole:.0f} s")
        killed, number = 0, 0
        while killed < asked.kills or number == 0:
            number += 1
            out = f"run{number}"
            while (code := round_(folder, out, draw, whole, kinds if killed < asked.kills else None)) != 0:
                if isinstance(code, str):
                    return wrong(code)
                killed = kinds.total()
            killed = kinds.total()
            if difference := differing(expected, rows(folder / out)):
                return wrong(f"{out}: {difference}")
    for kind, count in sorted(kinds.items()):
        print(f"{count:3} x {kind}")
    print(f"{killed} kills over {number} comparisons; all rows and models are equal bit by bit")
    return 0


def start(folder: Path, out: str) -> "subprocess.Popen[bytes]":
    sizes = "--steps 30 --batch 4 --length 32 --dim 32 --depth 1 --heads 2 --threads 1 --seeds 0,1"
    options = f"--mechanisms softmax,alibi,gated {sizes} --checkpoint --retry-failed".split()
    command = [sys.executable, "-m", "regard", "compare", "--text", "book.txt", "--out", out, *options]
    with (folder / f"{out}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)


def round_(folder: Path, out: str, draw: random.Random, whole: float, kinds: Counter[str] | None) -> int | str:
    """One start of the command, and one kill if `kinds` counts them; the exit code, or what is wrong."""
    run = start(folder, out)
    what = ""
    if kinds is not None:
        number, of_worker = draw.choice(SIGNALS), draw.random() < 0.4
        until = time.monotonic() + draw.random() * whole
        while time.monotonic() < until and run.poll() is None:
            time.sleep(0.005)
        family = descendants(run.pid)
        if run.poll() is None:
            victim = next((pid for pid in family if b"regard.bench.worker" in words(pid)), 0) if of_worker else 0
            what = f"{number.name} to {'a worker' if victim else 'the run'}"
            try:
                os.kill(victim or run.pid, number)
            except ProcessLookupError:  # just ended by itself
                what = ""
    code = run.wait()
    if what and kinds is not None:
        kinds[what] += 1
        if "run" in what and code not in (CODES[number], *DONE):
            return f"{out}: {what}: exit code {code}"
        if "worker" in what and code not in DONE:
            return f"{out}: {what}: exit code {code}"
        if left := outliving(family):
            return f"{out}: {what}: processes {left} outlive the run"
        print(f"{kinds.total():3} {what}: exit code {code}, {held(folder / out)} rows", flush=True)
    if b"Traceback" in (said := (folder / f"{out}.log").read_bytes()):
        return f"{out}: {said.decode(errors='replace')}"
    return 1 if what or code != 0 else 0


def outliving(family: list[int], seconds: float = 10.0) -> list[int]:
    until = time.monotonic() + seconds
    while (left := [pid for pid in family if stat(pid) and stat(pid)[0] != "Z"]) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def descendants(pid: int) -> list[int]:
    """Of a process, the nearest first."""
    parents = {int(name): int(found[1]) for name in os.listdir("/proc") if name.isdigit() and (found := stat(name))}
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def stat(pid: int | str) -> list[str]:
    """State and parent; [] of a process that is no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return []


def words(pid: int) -> bytes:
    """The worker's command line; the guard's has it too, but begins with its own."""
    try:
        said = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
    return b"" if b"guard.py" in said else said


def held(folder: Path) -> int:
    try:
        return len(read(folder))
    except StoreError:
        return 0


def rows(folder: Path) -> dict[str, Any]:
    """Key of a cell -> what it found but for what is measured, and its model."""
    found = {}
    for result in read(folder):
        record = {name: value for name, value in asdict(result).items() if name not in MEASURED}
        found[result.cell.key] = (repr(record), model(folder / result.checkpoint) if result.checkpoint else None)
    return found


def model(path: Path) -> tuple[Any, ...]:
    """All that the file holds; the order of its metadata is another in each process."""
    with safe_open(path, "np") as file:
        names = sorted(file.keys())
        return file.metadata(), names, [file.get_tensor(name).tobytes() for name in names]


def differing(expected: dict[str, Any], found: dict[str, Any]) -> str:
    if expected.keys() != found.keys():
        return f"{len(found)} cells, or others, in place of {len(expected)}"
    unlike = [key for key in expected if expected[key] != found[key]]
    return f"{len(unlike)} cells differ: {expected[unlike[0]][0]} and {found[unlike[0]][0]}" if unlike else ""


def wrong(what: str) -> int:
    print(f"wrong: {what}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
