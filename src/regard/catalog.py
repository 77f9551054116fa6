"""The catalogue: every card by name, and `create`, which builds a mechanism from its card.

Cards register themselves when their file is imported; the families' rooms are walked once, on first use. What needs
only facts that cards state, such as `regard list`, reads them from `catalogue.json` (see `regard.index`).
"""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from regard.cards import Card, _registry
from regard.checks import number
from regard.pipeline.layer import Attention
from regard.rooms import FAMILIES
from regard.shapes import head_shape

_walked: list[str] = []


def cards() -> dict[str, Card]:
    """Every card by name, in order of family and name."""
    if not _walked:
        for room in FAMILIES:
            try:
                package = importlib.import_module(f"regard.{room}")
            except ModuleNotFoundError as error:
                if error.name != f"regard.{room}":
                    raise
                continue  # a room that nobody has built yet
            for module in pkgutil.walk_packages(package.__path__, f"regard.{room}."):
                importlib.import_module(module.name)
        _walked.append("done")
    order = {room: n for n, room in enumerate(FAMILIES)}
    return dict(sorted(_registry.items(), key=lambda item: (order.get(item[1].family, 99), item[0])))


def names(family: str | None = None) -> list[str]:
    """Names of all cards, or of one family's: mechanisms, and analyses of what they do."""
    families = {card.family for card in cards().values()}
    if family is not None and family not in families:
        raise ValueError(unknown("family", family, sorted(families)))
    return [name for name, card in cards().items() if family in (None, card.family)]


def mechanisms(family: str | None = None) -> list[str]:
    """Names of all mechanisms, or of one family's: all that `create` can build."""
    return [name for name in names(family) if not cards()[name].is_function]


def analyses() -> list[str]:
    """Names of all analyses; `card(name).builder` is the function itself."""
    return [name for name in names() if cards()[name].protocol == "Analysis"]


def card(name: str) -> Card:
    """The card of that name. Raises ValueError with near names if there is none."""
    found = _registry.get(name) or cards().get(name)
    if found is None:
        raise ValueError(unknown("mechanism", name, list(cards())) + "; `regard list` shows all")
    return found


def create(
    name: str,
    *,
    dim: int,
    num_heads: int,
    causal: bool = False,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    dropout: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> nn.Module:
    """Build a mechanism by name: `create("kerple", dim=512, num_heads=8, causal=True)`.

    Names joined by "+" fill several slots of one layer: `create("gated+rotary", ...)`.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, dropout: as in `regard.Attention`.
        device, dtype: of all parameters and buffers. What must stay in float32 stays so.
        settings: the mechanism's own options (`regard show NAME` lists them) and, for mechanisms of the pipeline,
            the other keywords of `regard.Attention`.

    Raises:
        ValueError: unknown names and options (with near ones), sizes that don't fit, features the card lacks.
    """
    parts = [card(part.strip()) for part in name.split("+")]
    for part in parts:
        if part.is_function:
            where = f"{part.builder.__module__}.{part.builder.__name__}"
            what = "an analysis of attention" if part.protocol == "Analysis" else "a function"
            raise ValueError(f"create: {part.name!r} is {what}, not a layer; call {where}")
    supports = frozenset.intersection(*(c.supports for c in parts))
    wanted = {"causal" if causal else "bidirectional": True, "dropout": dropout > 0}
    own: set[str] = set().union(*(c.options for c in parts))
    wanted["gqa"] = num_kv_heads not in (None, num_heads) and not any(_sets_heads(c) for c in parts)
    for feature, asked in wanted.items():
        if asked and feature not in supports:
            near = [n for n, c in cards().items() if c.family == parts[0].family and feature in c.supports]
            hint = f"; of its family {', '.join(near)} do" if near else ""
            raise ValueError(f"create: {name!r} does not support {feature}{hint}")
    alone = not all(c.is_part for c in parts)
    if alone and len(parts) > 1:
        raise ValueError(f"create: {name!r}: only mechanisms that fill slots can be joined by '+'")
    layer = {p.name for p in inspect.signature(Attention).parameters.values() if p.kind is p.KEYWORD_ONLY}
    known = own | (set() if alone else layer)
    for key in settings.keys() - known:
        raise ValueError(unknown(f"option of {name!r}", key, sorted(known)))
    number(f"create: {name}", least=0, most=1, dropout=dropout)
    shape = head_shape(dim, num_heads, num_kv_heads, head_dim, who=f"create: {name}")
    given = {**vars(shape), "causal": causal, "dropout": dropout}
    with placed(device):
        if alone:
            _keeps_shape(parts[0], name, given)
            module = parts[0].build(given, settings)
        else:
            filled = slots(parts, given, {k: v for k, v in settings.items() if k in own})
            extra = {k: v for k, v in settings.items() if k not in own}
            for slot in filled.keys() & extra.keys():
                raise ValueError(f"create: {name!r} fills the slot {slot!r} itself; leave that option out")
            filled = {"num_kv_heads": num_kv_heads, **filled}
            module = Attention(dim, num_heads, head_dim=head_dim, causal=causal, dropout=dropout, **filled, **extra)
    if not isinstance(module, nn.Module):
        raise TypeError(f"create: the card {name!r} built a {type(module).__name__}, not an nn.Module")
    # Cast afterwards: under another default dtype, starting values would be other ones.
    module.to(device=device, dtype=dtype)
    module.supports, module.name = supports, name  # type: ignore[assignment]
    return module


def placed(device: torch.device | str | None) -> AbstractContextManager[Any]:
    """Where new tensors come to stand."""
    return nullcontext() if device is None else torch.device(device)


def slots(parts: Sequence[Card], given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What all parts fill together; each slot once."""
    filled: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for part in parts:
        mine = {k: v for k, v in own.items() if k in part.options}
        for slot, value in part.parts(given, mine).items():
            if slot in filled:
                raise ValueError(f"create: {owner[slot]!r} and {part.name!r} both fill the slot {slot!r}")
            filled[slot], owner[slot] = value, part.name
    return filled


def _sets_heads(card: Card) -> bool:
    """Whether the mechanism itself is about the number of key heads, so that it is asked and not the feature."""
    return card.is_part and card.made is not None and card.made.slot == "num_kv_heads"


def _keeps_shape(card: Card, name: str, given: Mapping[str, Any]) -> None:
    """A class that takes no head width, or no number of key heads, must not be asked for another than its own."""
    plain = head_shape(given["dim"], given["num_heads"], None, None) if not given["dim"] % given["num_heads"] else None
    for key in ("num_kv_heads", "head_dim"):
        if not card.takes(key) and plain is not None and given[key] != getattr(plain, key):
            raise ValueError(f"create: {name!r} has no {key} of its own (got {given[key]}); leave it out")


def unknown(what: str, name: str, known: Sequence[str]) -> str:
    """'unknown what 'nmae'; did you mean 'name'?'"""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"unknown {what} {name!r}" + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")
