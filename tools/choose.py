"""Which attention should I use? Tables of properties from the catalogue, as Markdown: by family.

Nothing here is measured: growth is that of the cards' formulas, the rest what the cards claim and the laws test.
"""

import ast
import math
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from regard import cost, index
from regard.cli.table import KINDS
from regard.rooms import FAMILIES

SRC = Path(index.FILE).parent
LENGTHS = (2**40, 2**48)
"""Between these the growth of a formula is taken: so far out that its largest term is all that counts."""

EXACT = {
    "exact": "every pair that the mask allows is scored; the kernels give what the equation says, up to rounding",
    "chosen": "content chooses the pairs that are scored; the others are left out",
    "own": "a class of its own and no such pipeline; its page says what it computes",
}
"""The last column: what becomes of the pairs of queries and keys."""

LEGEND = (
    "Cost: how time grows with T, the number of tokens, pixels or nodes, by the card's formula, all else being fixed. "
    "State: what a stream keeps of the past.",
    " ".join(f"**{word}**: {meaning}." for word, meaning in EXACT.items()),
)

Entry = index.Entry


def choosable() -> list[Entry]:
    """Every mechanism that takes tensors and gives some: no analyses."""
    return [entry for entry in index.entries() if entry["form"] != "function"]


def exactness(entry: Entry) -> str:
    """A key of EXACT."""
    if "routed" in entry["traits"]:
        return "chosen"
    return "exact" if entry["form"] == "part" else "own"


def growth(entry: Entry, what: str) -> str:
    """How a card's 'time' or 'state' grows with T: 'T²', 'T log T', 'T', 'fixed'; '' where there is no formula."""
    formula = entry["cost"][what]
    if not formula:
        return ""
    short, long = (_at(formula, entry, length) for length in LENGTHS)
    if short is None or long is None:
        return "?"
    if long == 0:
        return "none"
    exponent = math.log(long / short) / math.log(LENGTHS[1] / LENGTHS[0])
    if exponent < 0.02:
        return "fixed"
    if "log" in formula and 0.02 < exponent % 1 < 0.3:
        return f"{_power(math.floor(exponent))} log T"
    return _power(exponent)


def _power(exponent: float) -> str:
    nearest = round(exponent, 1)
    return {1.0: "T", 2.0: "T²", 3.0: "T³"}.get(nearest, f"T^{nearest:g}")


def _at(formula: str, entry: Entry, length: int) -> float | None:
    """The formula at one length. Of an option without a number the example has one."""
    side = math.isqrt(length)
    axes = {"B": 1, "H": 8, "G": 8, "D": 64, "V": 64, "M": 512, "C": 512, "L": 4}
    sizes = {**axes, "T": length, "S": length, "Y": side, "X": side, "N": length, "E": 8 * length}
    own = {name: _number(value) for name, value in {**entry["options"], **entry["preset"]}.items()}
    given = {name: value for name, value in own.items() if value is not None}
    asked = {node.id for node in ast.walk(ast.parse(formula)) if isinstance(node, ast.Name)}
    for name in asked - given.keys() - sizes.keys():
        if (value := _number(entry["example"].get(name))) is not None:
            given[name] = value
    if "max_length" in asked:  # tables and filters as long as the input may be
        given["max_length"] = length
    try:
        return cost.evaluate(formula, {**sizes, **given})
    except ValueError:
        return None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


# --- tables -------------------------------------------------------------------------------------------------


def families() -> str:
    """One row a family."""
    found = choosable()
    rows = []
    for family in FAMILIES:
        here = [entry for entry in found if entry["family"] == family]
        if not here:
            continue
        causal, streams = (sum(e["supports"][name] for e in here) for name in ("causal", "streaming"))
        rows.append(
            (
                f"{family} ({len(here)})",
                said(family),
                _several(KINDS[e["protocol"]][1] for e in here),
                _share(causal, len(here)),
                _share(streams, len(here)),
                _several(growth(e, "time") for e in here),
                _several(state(e) for e in here if e["supports"]["streaming"]),
                _several(exactness(e) for e in here),
            )
        )
    return table(("family", "what it is about", "kind", "causal", "streams", "cost", "state", "exact"), rows)


def each(family: str, link: str = "{}.md") -> str:
    """One row a mechanism of a family; `link` makes a page's address of its name."""
    yes = {True: "yes", False: "–"}
    rows = [
        (
            f"[{entry['name']}]({link.format(entry['name'])})",
            KINDS[entry["protocol"]][1],
            yes[entry["supports"]["causal"]],
            yes[entry["supports"]["bidirectional"]],
            yes[entry["supports"]["streaming"]],
            growth(entry, "time"),
            state(entry) or "–",
            exactness(entry),
            plain(entry["gist"]),
        )
        for entry in choosable()
        if entry["family"] == family
    ]
    return table(("name", "kind", "causal", "both ways", "streams", "cost", "state", "exact", "what it does"), rows)


def whole() -> str:
    """Every mechanism, family by family."""
    here = [family for family in FAMILIES if any(entry["family"] == family for entry in choosable())]
    parts = [f"### {family}\n\n{said(family)}.\n\n{each(family, 'mechanisms/{}.md')}" for family in here]
    return "\n\n".join([*LEGEND, *parts])


def state(entry: Entry) -> str:
    """What a stream keeps, in a word; '' where it can't stream."""
    if not entry["supports"]["streaming"]:
        return ""
    grown = growth(entry, "state")
    return "grows" if grown.startswith("T") else grown


def said(family: str) -> str:
    """The first line of the room's own docstring, without what stands before its colon."""
    text = ast.get_docstring(ast.parse((SRC / family / "__init__.py").read_text(encoding="utf-8"))) or ""
    line = text.partition("\n")[0].partition(". ")[0].rstrip(".")
    name, colon, rest = line.partition(": ")
    line = rest if colon and len(name.split()) <= 2 else line
    return plain(line[:1].upper() + line[1:])


def plain(text: str) -> str:
    """Text in which Markdown finds nothing to mark up but what stands in backticks."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\\*_<>|\[\]])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """As Markdown has it."""
    head = tuple(head)
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """A bar in code would end the cell on GitHub."""
    code = re.compile(r"`([^`]*\|[^`]*)`")
    return code.sub(lambda found: f"<code>{escape(found[1]).replace('|', '&#124;')}</code>", text)


def _share(part: int, whole: int) -> str:
    return {0: "none", whole: "all"}.get(part, f"{part}")


def _several(found: Iterable[str]) -> str:
    """The words that occur, the most frequent first."""
    counted: Mapping[str, int] = {}
    for word in found:
        counted = {**counted, word: counted.get(word, 0) + 1}
    return ", ".join(sorted(counted, key=lambda word: -counted[word])) or "–"


if __name__ == "__main__":
    print("\n\n".join([families(), *LEGEND]))
