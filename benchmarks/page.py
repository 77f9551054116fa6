"""docs/benchmarks.md, from the JSON of every benchmark that has been run: goals first, then all figures."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.goals import figure_of, verdicts
from benchmarks.harness import FOLDER, HEADINGS, cells

HEAD = """# Benchmarks

Made by `make bench`; `python -m benchmarks NAME` runs one anew. Regard and its peers run in turns in one process, after
their results have been found to agree. Ratios are medians over the rounds, with the least and the greatest. "Of peak"
is what the one that is measured achieved of the matrix-product peak found in the same process, in its best round.
"""
GOALS_HEADINGS = ("work", "goal", "measured", "")


def records(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """What every benchmark has saved, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def summary(found: Iterable[dict[str, Any]]) -> list[list[str]]:
    """A row for every goal: work, goal, measured, and whether it is met."""
    return [[v.goal.work, v.goal.words, v.measured, v.said] for v in verdicts(found)]


def rendered(found: Sequence[dict[str, Any]]) -> str:
    """The page."""
    gpu = [r for r in found if r["name"].startswith("gpu")]
    cpu = [r for r in found if r not in gpu]
    goals = "A goal with several figures is met when all are; the one furthest from it is shown.\n\n"
    parts = [HEAD, "## Goals\n\n" + goals + _markdown(GOALS_HEADINGS, summary(found))]
    gpu = [r for r in gpu if any(figure["value"] is not None for figure in r["figures"])]
    parts += ["## GPU\n", *(map(_section, gpu) if gpu else ["Not measured.\n"]), "## CPU\n", *map(_section, cpu)]
    return "\n".join(parts)


def _section(record: dict[str, Any]) -> str:
    on = ", ".join(f"{k} {v}" if k != "device" else v for k, v in record["machine"].items())
    shape = ", ".join(f"{k} = {v}" for k, v in record.get("shape", {}).items())
    lines = f"### {record['about']}\n\n`python -m benchmarks.{record['name']}` on {on}."
    lines += f"\nShapes: {shape}." if shape else ""
    return lines + "\n\n" + _markdown(HEADINGS, map(cells, map(figure_of, record["figures"])))


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
