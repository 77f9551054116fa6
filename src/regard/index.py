"""The catalogue as data, read from `catalogue.json` in a moment and without torch; and how a card is written there.

The file has one line for each card and task; `python tools/catalogue.py` makes it anew. `regard.catalog` holds the
cards themselves.
"""

import functools
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.checks import meant, short
from regard.rooms import FAMILIES

if TYPE_CHECKING:
    from regard.cards import Card

FILE = Path(__file__).with_name("catalogue.json")

Entry = dict[str, Any]
"""What a card says, as JSON has it; see `data`."""


# --- reading ------------------------------------------------------------------------------------------------


@functools.cache
def _written() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def entries(family: str | None = None) -> list[Entry]:
    """Every card, or those of one family, in order of family and name.

    Cards that this process has made besides are among them.
    """
    found: dict[str, Entry] = {entry["name"]: entry for entry in _written()["cards"]}
    live = getattr(sys.modules.get("regard.cards"), "_registry", {})
    found |= {name: data(card) for name, card in live.items() if name not in found}
    order = {room: n for n, room in enumerate(FAMILIES)}
    listed = sorted(found.values(), key=lambda entry: (order.get(entry["family"], len(order)), entry["name"]))
    families = sorted({entry["family"] for entry in listed})
    if family is not None and family not in families:
        raise ValueError(unknown("family", family, families))
    return [entry for entry in listed if family in (None, entry["family"])]


def find(name: str) -> Entry | None:
    """The entry of that name in the file, if there is one."""
    return next((entry for entry in _written()["cards"] if entry["name"] == name), None)


def tasks() -> dict[str, Entry]:
    """Every task of `regard compare` by name, the default first: what it takes, its options and defaults."""
    return {task["name"]: task for task in _written()["tasks"]}


def unknown(what: str, name: str, known: Iterable[str], *, who: str = "regard", one: str = "") -> str:
    """who: what is unknown (got 'nmae'); expected one of ...; did you mean 'name'?

    `one` says what is expected where that is too much to list.
    """
    known = list(known)
    told = "; ".join(filter(None, [one or f"one of {', '.join(known)}", meant(name, known)]))
    return f"{who}: {what} is unknown (got {short(repr(name))}); expected {told}"


def lacks(who: str, what: str, name: str, known: Iterable[str], common: Iterable[str] = ()) -> str:
    """'who' has no such what (got 'nmae'); expected one of ...; `common` ones are its too, and not listed."""
    known = sorted(known)
    told = f"expected one of {', '.join(known)}" if known else f"expected none: it has no {what}s of its own"
    hint = meant(name, [*known, *common])
    words = f"{who!r} has no such {what} (got {short(repr(name))}); {told}"
    return f"{words}; {hint}" if hint else words


# --- writing ------------------------------------------------------------------------------------------------


def data(card: "Card") -> Entry:
    """All that a card says, as JSON can hold it."""
    from inspect import Parameter

    from regard.cards import FEATURES

    made, builder = card.made, card.builder
    assert made is not None
    names = ("title", "authors", "year", "ref", "read", "url")
    return {
        "name": card.name,
        "family": card.family,
        "gist": card.gist,
        "equation": card.equation,
        "papers": [{name: getattr(paper, name) for name in names} for paper in card.papers],
        "form": made.form,
        "where": f"{builder.__module__}.{builder.__name__}",
        "fills": fills(card),
        "protocol": card.protocol,
        "supports": {name: name in card.supports for name in sorted(FEATURES)},
        "traits": sorted(card.traits),
        "cost": {"time": card.cost.time, "state": card.cost.state},
        "options": {name: None if v is Parameter.empty else literal(v) for name, v in card.options.items()},
        "defaults": {name: card.defaults[name] for name in card.options if name in card.defaults},
        "required": [name for name, default in card.options.items() if default is Parameter.empty],
        "variant_of": None if card.base is None else card.base.name,
        "preset": {name: literal(value) for name, value in card.preset.items()},
        "tied": list(getattr(builder, "tied", ())),
        "auxiliary": card.auxiliary,
        "tasks": list(card.tasks),
        "example": {name: literal(value) for name, value in card.example.items()},
        "claim": card.claim,
        "differs": list(card.differs),
        "verified": card.verified,
        "exceptions": dict(card.exceptions),
    }


def literal(value: object) -> object:
    """The value itself where JSON has it, else how Python writes it."""
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if isinstance(value, str | int | float | bool | None) and finite else repr(value)


SMALL: dict[str, Any] = {"dim": 24, "num_heads": 6}
"""The instance that is built where one must be looked at, with the options of the card's example."""


def fills(card: "Card") -> list[str]:
    """The slots that the mechanism fills; none for a layer of its own."""
    if not card.is_part or card.made is None:
        return []
    if card.made.slot:
        return [card.made.slot]
    from regard.shapes import head_shape

    given = {**vars(head_shape(**SMALL)), "causal": False, "dropout": 0.0}
    return list(card.parts(given, card.example))


def line(entry: Mapping[str, Any]) -> str:
    """One line of the file."""
    return json.dumps(entry, ensure_ascii=False, allow_nan=False)
