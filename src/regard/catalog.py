"""The catalogue: every card by name, and `create`, which builds a mechanism from its card.

Cards register themselves when their file is imported; the families' rooms are walked once, on first use. What needs
only facts that cards state, such as `regard list`, reads them from `catalogue.json` (see `regard.index`).
"""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from regard.cards import GIVEN, Card, _registry
from regard.checks import flag, number, refuse
from regard.index import lacks, unknown
from regard.pipeline.layer import Attention
from regard.rooms import FAMILIES
from regard.shapes import head_shape
from regard.spec import Spec, parse

LAYER = frozenset(
    p.name
    for p in inspect.signature(Attention).parameters.values()
    if p.kind is p.KEYWORD_ONLY and p.name not in (*GIVEN, "device", "dtype")
)
"""What one may say of a layer of the pipeline, whatever fills its slots."""
SIZES = ("num_kv_heads", "head_dim", "dropout")
"""Arguments of `create` that may also be written in brackets."""
NO_LAYERS = ("CachePolicy", "Training", "Steer")
"""Protocols of things that are no modules; they may be of any class."""
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
                if not module.name.rpartition(".")[2].startswith("_"):  # private files hold no cards, but need more
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
        raise ValueError(unknown("mechanism", name, list(cards()), one="one of those that `regard list` shows"))
    return found


def create(
    name: str,
    *,
    dim: int | None = None,
    num_heads: int | None = None,
    causal: bool = False,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    dropout: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> Any:
    """Build a mechanism by name: `create("kerple", dim=512, num_heads=8, causal=True)`.

    Names joined by "+" fill several slots of one layer, and options may be written behind the name of the part that
    they are for: `create("window(window=32)+rotary(base=500)", ...)`.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, dropout: as in `regard.Attention`. What changes no layer's sizes
            (a cache policy, a way of training or steering) needs no dim and num_heads.
        device, dtype: of all parameters and buffers. What must stay in float32 stays so.
        settings: the mechanism's own options (`regard show NAME` lists them) and, for mechanisms of the pipeline,
            the other keywords of `regard.Attention`.

    Raises:
        ValueError: unknown names and options (with near ones), sizes that don't fit, features the card lacks.
    """
    if not isinstance(name, str):
        refuse("create", "name", "has the wrong type", repr(name), "the name of a mechanism", error=TypeError)
    flag(f"create: {name}", causal=causal)
    spec = parse(name)
    parts = [card(part) for part in spec.names]
    written, name = str(spec), spec.name
    for part in parts:
        if part.is_function:
            where = f"{part.builder.__module__}.{part.builder.__name__}"
            what = "an analysis of attention" if part.protocol == "Analysis" else "a function"
            raise ValueError(f"create: {part.name!r} is {what}, not a layer; call {where}")
    alone = not all(c.is_part for c in parts)
    if alone and len(parts) > 1:
        got = " and ".join(f"{c.name!r}, a {c.protocol}" for c in parts if not c.is_part)
        raise ValueError(f"create: {name!r}: only mechanisms that fill slots can be joined by '+' (got {got})")
    told, extra = told_each("create", spec, parts, settings, {*SIZES, *(() if alone else LAYER)})
    if sizes := {key: extra.pop(key) for key in SIZES if key in extra}:  # which are arguments of this very function
        given_too = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "dropout": dropout or None}
        for key in sizes:
            if given_too[key] is not None:
                refuse("create", key, f"is said twice, in {written!r} and beside it", given_too[key], "it once")
        num_kv_heads, head_dim = sizes.get("num_kv_heads", num_kv_heads), sizes.get("head_dim", head_dim)
        dropout = sizes.get("dropout", dropout)
    number(f"create: {name}", least=0, most=1, dropout=dropout)
    supports = frozenset.intersection(*(frozenset(c.supports) for c in parts))
    wanted = {"causal" if causal else "bidirectional": parts[0].protocol not in NO_LAYERS, "dropout": dropout > 0}
    wanted["gqa"] = num_kv_heads not in (None, num_heads) and not any(_sets_heads(c) for c in parts)
    for feature, asked in wanted.items():
        if asked and feature not in supports:
            near = [n for n, c in cards().items() if c.family == parts[0].family and feature in c.supports]
            hint = f"; of its family {', '.join(near)} do" if near else ""
            raise ValueError(f"create: {name!r} does not support {feature}{hint}")
    if alone and parts[0].protocol != "Loss":  # which only looks at layers that were built with these
        _hears(parts[0], causal=causal and "bidirectional" in supports, dropout=dropout > 0)
    given: dict[str, Any] = {"causal": causal, "dropout": dropout}
    if dim is not None and num_heads is not None:
        given |= vars(head_shape(dim, num_heads, num_kv_heads, head_dim, who=f"create: {name}"))
    elif not alone or parts[0].takes("dim") or parts[0].takes("num_heads"):
        missing = " and ".join(n for n, v in (("dim", dim), ("num_heads", num_heads)) if v is None)
        raise ValueError(f"create: {name!r} needs {missing} (got none); expected ints, as dim=512, num_heads=8")
    with placed(device):
        if alone:
            if "dim" in given:
                _keeps_shape(parts[0], name, given)
            module: Any = parts[0].build(given, told[0])
        else:
            filled = slots(parts, given, told)
            for slot in filled.keys() & extra.keys():
                raise ValueError(f"create: {name!r} fills the slot {slot!r} itself; leave that option out")
            filled = {"num_kv_heads": num_kv_heads, **filled}
            module = Attention(
                given["dim"], given["num_heads"], head_dim=head_dim, causal=causal, dropout=dropout, **filled, **extra
            )
    if not isinstance(module, nn.Module):
        if parts[0].protocol in NO_LAYERS:
            return module
        raise TypeError(f"create: the card {name!r} built a {type(module).__name__}, not an nn.Module")
    # Cast afterwards: under another default dtype, starting values would be other ones.
    module.to(device=device, dtype=dtype)
    module.supports, module.name = supports, name  # type: ignore[assignment]
    module.lacks = {feature: why for card in parts for feature, why in card.lacks.items()}  # type: ignore[assignment]
    return module


def placed(device: torch.device | str | None) -> AbstractContextManager[Any]:
    """Where new tensors come to stand."""
    return nullcontext() if device is None else torch.device(device)


def told_each(
    who: str, spec: Spec, parts: Sequence[Card], settings: Mapping[str, Any], common: AbstractSet[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Of each part its options, whether written in its brackets or given beside; and what concerns the layer.

    What stands in brackets is for that part alone; what is given beside, for each that has such an option. Nothing
    that is written or given is left out: each option is somebody's, once, or refused.

    Args:
        common: options of the whole layer, which any part may have in its brackets.
    """
    rest: dict[str, Any] = {}
    told: list[dict[str, Any]] = []
    own: set[str] = set().union(*(card.options for card in parts))
    for part, card in zip(spec.parts, parts, strict=True):
        for key, value in part.options.items():
            if key not in {*card.options, *common}:
                raise ValueError(f"{who}: {lacks(part.name, 'option', key, card.options, common)}")
            if key in settings or (key in rest and key not in card.options):
                got = f"{value!r} and {settings[key] if key in settings else rest[key]!r}"
                refuse(who, f"option {key!r} of {part.name!r}", "is said twice", got, "it once")
            if key not in card.options:
                rest[key] = value
        told.append({k: v for k, v in {**settings, **part.options}.items() if k in card.options})
    for key in settings.keys() - own:
        if key not in common:
            raise ValueError(f"{who}: {lacks(spec.name, 'option', key, own, {*common, *GIVEN})}")
        rest[key] = settings[key]
    return told, rest


def slots(parts: Sequence[Card], given: Mapping[str, Any], told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all parts, each told its options, fill together; each slot once."""
    filled: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for part, mine in zip(parts, told, strict=True):
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
    plain = {"num_kv_heads": given["num_heads"], "head_dim": given["dim"] / given["num_heads"]}
    for key, usual in plain.items():
        if not card.takes(key) and given[key] != usual:
            refuse(f"create: {name}", key, "is none of its options", given[key], f"none; it has {usual:g}")


def _hears(card: Card, **asked: bool) -> None:
    """What is asked for must not fall on deaf ears: the card claims it, but the class may have no such argument."""
    for name in (name for name, wanted in asked.items() if wanted and not card.takes(name)):
        raise ValueError(
            f"create: {card.name!r} claims to support {name}, but {card.builder.__qualname__} takes no such argument "
            f"(got {name}={asked[name]!r}); expected `{name}` or `**rest: Unpack[...]` in its signature"
        )
