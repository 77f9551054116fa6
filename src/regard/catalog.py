"""The catalogue: every card by name, and `create`, which builds a mechanism from its card.

Cards register themselves when their file is imported; the families' rooms are walked once, on first use.
"""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from regard.attention import Attention
from regard.card import Card, _registry
from regard.kinds import HeadShape
from regard.layer import head_counts

ROOMS = [
    "masks",
    "kernels",
    "scores",
    "positions",
    "normalizers",
    "heads",
    "routing",
    "linear",
    "mixers",
    "cross",
    "recurrent",
    "vision",
    "detection",
    "graph",
    "timeseries",
    "cache",
    "distributed",
    "training",
    "inspect",
]
"""The sub-packages that may hold cards."""

_walked: list[str] = []


def cards() -> dict[str, Card]:
    """Every card by name, in order of family and name."""
    if not _walked:
        for room in ROOMS:
            try:
                package = importlib.import_module(f"regard.{room}")
            except ModuleNotFoundError as error:
                if error.name != f"regard.{room}":
                    raise
                continue  # a room that nobody has built yet
            for module in pkgutil.walk_packages(package.__path__, f"regard.{room}."):
                importlib.import_module(module.name)
        _walked.append("done")
    order = {room: n for n, room in enumerate(ROOMS)}
    return dict(sorted(_registry.items(), key=lambda item: (order.get(item[1].family, 99), item[0])))


def names(family: str | None = None) -> list[str]:
    """Names of all cards, or of one family's: mechanisms, and analyses of what they do."""
    families = {card.family for card in cards().values()}
    if family is not None and family not in families:
        raise ValueError(_unknown("family", family, sorted(families)))
    return [name for name, card in cards().items() if family in (None, card.family)]


def mechanisms(family: str | None = None) -> list[str]:
    """Names of all mechanisms, or of one family's: all that `create` can build."""
    return [name for name in names(family) if cards()[name].protocol != "Analysis"]


def analyses() -> list[str]:
    """Names of all analyses; `card(name).build` is the function itself."""
    return [name for name in names() if cards()[name].protocol == "Analysis"]


def card(name: str) -> Card:
    """The card of that name. Raises ValueError with near names if there is none."""
    known = cards()
    if name not in known:
        raise ValueError(_unknown("mechanism", name, list(known)) + "; `regard list` shows all")
    return known[name]


def options(of: Card) -> dict[str, Any]:
    """The mechanism's own options and their defaults."""
    parameters = inspect.signature(of.slots or _required(of.build)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "causal"}


def create(
    name: str,
    *,
    dim: int,
    num_heads: int,
    causal: bool = False,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> nn.Module:
    """Build a mechanism by name: `create("kerple", dim=512, num_heads=8, causal=True)`.

    Names joined by "+" fill several slots of one layer: `create("gated+rotary", ...)`.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, dropout: as in `regard.Attention`.
        settings: the mechanism's own options (`regard show NAME` lists them) and, for mechanisms of the pipeline,
            the other keywords of `regard.Attention`.

    Raises:
        ValueError: unknown names and options (with near ones), sizes that don't fit, features the card lacks.
    """
    parts = [card(part.strip()) for part in name.split("+")]
    for part in parts:
        if part.protocol == "Analysis":
            where = f"{_required(part.build).__module__}.{_required(part.build).__name__}"
            raise ValueError(f"create: {part.name!r} is an analysis of attention, not a layer; call {where}")
    supports = frozenset.intersection(*(c.supports for c in parts))
    wanted = {"causal" if causal else "bidirectional": True, "dropout": dropout > 0}
    wanted["gqa"] = num_kv_heads not in (None, num_heads) and not any("gqa" in c.name for c in parts)
    for feature, asked in wanted.items():
        if asked and feature not in supports:
            near = [n for n, c in cards().items() if c.family == parts[0].family and feature in c.supports]
            hint = f"; of its family {', '.join(near)} do" if near else ""
            raise ValueError(f"create: {name!r} does not support {feature}{hint}")
    own: set[str] = set().union(*(options(c) for c in parts))
    pipeline = {p.name for p in inspect.signature(Attention).parameters.values() if p.kind is p.KEYWORD_ONLY}
    known = own | (pipeline if all(c.slots for c in parts) else {"device", "dtype"})
    for key in settings.keys() - known:
        raise ValueError(_unknown(f"option of {name!r}", key, sorted(known)))
    G, D = head_counts(dim, num_heads, num_kv_heads, head_dim)
    shape = HeadShape(dim, num_heads, G, D)
    if any(c.build for c in parts):
        if len(parts) > 1:
            raise ValueError(f"create: {name!r}: only mechanisms that fill slots can be joined by '+'")
        if "dropout" in own:
            settings = {"dropout": dropout, **settings}
        if dropout:
            settings["dropout"] = dropout
        module = _required(parts[0].build)(shape, causal=causal, **settings)
    else:
        filled = _slots(parts, shape, {k: v for k, v in settings.items() if k in own})
        extra = {k: v for k, v in settings.items() if k not in own}
        for slot in filled.keys() & extra.keys():
            raise ValueError(f"create: {name!r} fills the slot {slot!r} itself; leave that option out")
        filled = {"num_kv_heads": num_kv_heads, **filled}
        module = Attention(dim, num_heads, head_dim=head_dim, causal=causal, dropout=dropout, **filled, **extra)
    if not isinstance(module, nn.Module):
        raise TypeError(f"create: the card {name!r} built a {type(module).__name__}, not an nn.Module")
    module.supports, module.name = supports, name  # type: ignore[assignment]
    return module


def _slots(parts: Sequence[Card], shape: HeadShape, own: dict[str, Any]) -> dict[str, Any]:
    """What all parts fill together; each slot once."""
    filled: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for part in parts:
        mine = {k: v for k, v in own.items() if k in options(part)}
        for slot, value in _required(part.slots)(shape, **mine).items():
            if slot in filled:
                raise ValueError(f"create: {owner[slot]!r} and {part.name!r} both fill the slot {slot!r}")
            filled[slot], owner[slot] = value, part.name
    return filled


def _required(builder: Callable[..., Any] | None) -> Callable[..., Any]:
    assert builder is not None  # a card has one of the two; Card checks it
    return builder


def _unknown(what: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"unknown {what} {name!r}" + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")
