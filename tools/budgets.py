"""Whether what the default comparison says holds: it is run with 1, 3 and 10 times its steps, and the orders are held
against each other. No pair that the shortest run tells apart may stand the other way round in a longer one.

    python tools/budgets.py --out runs/budgets                    about 14 times as long as `regard compare`
    python tools/budgets.py --out runs/budgets --times 1 3        as far as that goes; finished cells are kept

Exit code: 0 if nothing that was told apart is reversed, 1 if something is.
"""

import argparse
from pathlib import Path

from rich.console import Console

from regard.bench.closing import table
from regard.bench.compare import execute
from regard.bench.config import CompareConfig
from regard.bench.live import Live
from regard.bench.report.groups import Group, grouped
from regard.bench.report.verdict import verdict
from regard.bench.report.wording import sentences
from regard.tasks import find


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default=CompareConfig.task)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 3, 10])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/budgets"))
    asked = parser.parse_args()
    console, groups = Console(highlight=False), []
    for times in sorted(asked.times):
        steps = times * find(asked.task).defaults.steps
        config = CompareConfig(task=asked.task, steps=steps, threads=asked.threads, out=asked.out / f"{steps}-steps")
        with Live(config, console) as live:
            results = execute(config, live).results
        console.print(table(results, console.width), soft_wrap=True)
        (group,) = grouped(results)
        console.print("\n".join(sentences(group)), markup=False, soft_wrap=True)
        groups.append(group)
    first, *longer = groups
    told = verdict(first)
    apart = [row.label for row, pair in told.pairs if pair.apart] if told else []
    lost = [name for name in apart for group in longer if place(group, name) < place(group, first.ranked[0].label)]
    for times, group in zip(sorted(asked.times), groups):
        console.print(f"{times:>3} x: {' > '.join(row.label for row in group.ranked)}", markup=False)
    console.print(f"told apart from {first.ranked[0].label} at 1 x: {', '.join(apart) or 'nothing'}", markup=False)
    console.print(f"of these reversed in a longer run: {', '.join(dict.fromkeys(lost)) or 'nothing'}", markup=False)
    return 1 if lost else 0


def place(group: Group, name: str) -> int:
    """From the best, which is 0."""
    return [row.label for row in group.ranked].index(name)


if __name__ == "__main__":
    raise SystemExit(main())
