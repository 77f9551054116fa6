"""Write the rows of tests/laws/rows, which say what each card builds and computes (law L48).

    python tools/rows.py NAME [...]     measure these cards anew; prints the old and the new rows
    python tools/rows.py --all          only adds the cards that have no rows yet

Rows are evidence: they change by name, and whoever changes them says in the commit why the new numbers are right.
"""

import argparse
import sys
from pathlib import Path

import torch

import regard

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from laws import built


def main(names: list[str], everything: bool) -> None:
    """Write what has changed."""
    torch.set_num_threads(1)
    held = {path: built.read(path) for path in sorted(built.FOLDER.glob("*.json"))}
    committed = {name: rows for cards in held.values() for name, rows in cards.items()}
    if everything:
        names = [name for name in regard.mechanisms() if name not in committed]
    known = {*regard.mechanisms(), *committed}
    for name in names:
        if name not in known:
            sys.exit(f"rows: {name!r} is no mechanism; `regard list` shows all")
        for cards in held.values():
            cards.pop(name, None)
        rows = built.rows(name) if name in regard.mechanisms() else []
        if rows:
            held.setdefault(built.file(name), {})[name] = rows
        show(committed.get(name, []), rows)
    for path, cards in held.items():
        if cards:
            built.write(path, cards)
        else:
            path.unlink(missing_ok=True)


def show(old: list[built.Row], new: list[built.Row]) -> None:
    """The rows that differ, each as it was and as it is."""
    before, after = ({(row["row"], row["causal"]): row for row in rows} for rows in (old, new))
    for key in [*before, *(after.keys() - before.keys())] if before else after:
        if before.get(key) != after.get(key):
            for sign, rows in (("-", before), ("+", after)):
                if key in rows:
                    print(sign, built.line(rows[key]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true", help="add every card that has no rows yet; changes no other")
    asked = parser.parse_args()
    if asked.all == bool(asked.names):
        parser.error("give the names of cards, or --all for those that have no rows yet")
    main(asked.names, asked.all)
