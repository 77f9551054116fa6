"""Mechanisms as data: what fills the slots of a swapped layer, written so that it can be built again, and read back.

A name of the catalogue is written with all its options as `regard.spec` reads them, a part of this library as its class
with its arguments, a mask as a tree of its numbers; tensors that masks hold are put beside. Nothing is ever code: what
can't be said so is refused, and so is what does not come out of its own description.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from regard import masks
from regard.catalog import card, cards, told_each
from regard.checks import choice, refuse, whole
from regard.integrations.slots import Parts
from regard.masks import Mask, algebra, grids, patterns, rows, selection, shifted, structured, varlen, words
from regard.masks import tensors as held
from regard.rooms import FAMILIES
from regard.shapes import HeadShape
from regard.slots import SLOTS
from regard.spec import Part, Spec, parse

LARGEST = 2**62
"""No number of a recipe is larger: positions are counted in 64 bits."""
WHO = "recipe"


def spelled(mechanism: str, options: Mapping[str, Any]) -> str:
    """The mechanism with every option it has, defaults included, so that it stays what it is when these change."""
    spec = parse(mechanism)
    known = [card(name) for name in spec.names]
    told, _ = told_each("swap", spec, known, options, {"kernel"})
    each = [
        {k: v for k, v in {**c.options, **mine}.items() if v is not inspect.Parameter.empty}
        for c, mine in zip(known, told)
    ]
    return _text(Spec(tuple(Part(c.name, mine) for c, mine in zip(known, each))), mechanism)


def part_as_data(part: Any, shape: HeadShape, tensors: dict[str, Tensor]) -> Any:
    """What fills a slot: a tree for a mask, whose tensors are added to `tensors`; text for a part of this library.

    Widths that the part does not keep are taken for those of its layer: `unlike` tells whether they are.
    """
    if isinstance(part, Mask):
        return mask_as_data(part, tensors)
    name = type(part).__name__
    if part_classes().get(name) is not type(part):
        _refuse(
            type(part).__qualname__, "is no part of this library", "a name of the catalogue, which can be registered"
        )
    arguments, widths = {}, vars(shape)
    for argument, told in inspect.signature(type(part)).parameters.items():
        if told.kind in (told.VAR_POSITIONAL, told.VAR_KEYWORD):
            continue
        if not hasattr(part, argument) and argument not in widths:
            _refuse(name, f"does not keep its argument {argument!r}", "the mechanism's name in its place")
        arguments[argument] = getattr(part, argument, widths.get(argument))
    return _text(Spec((Part(name, arguments),)), name)


def part_from_data(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The part again. Raises ValueError or TypeError, or what its class does, where there is none."""
    if isinstance(data, Mapping):
        return mask_from_data(data, tensors)
    spec = parse(_word(data, "a part"), "part")
    (part,) = spec.parts
    choice(WHO, sorted(part_classes()), part=part.name)
    return part_classes()[part.name](**part.options)


def part_classes() -> dict[str, type]:
    """Every class of this library that fills a slot, by its name."""
    cards()
    kinds = tuple(slot.kind for slot in SLOTS.values() if slot.kind is not Mask)
    found: dict[str, type] = {}
    waiting = list(kinds)
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        room, _, rest = kind.__module__.removeprefix("regard.").partition(".")
        if kind.__module__.startswith("regard.") and room in FAMILIES and rest:
            found[kind.__name__] = kind
    return found


# --- masks ---------------------------------------------------------------------------------------------------

_NUMBERS: dict[type[Mask], dict[str, str]] = {
    patterns.Diagonals: {"back": "distance", "ahead": "distance", "step": "size", "words": "words"},
    patterns.Blocks: {"size": "size", "before": "length"},
    patterns.NearBlocks: {"size": "size", "near": "length"},
    patterns.GlobalTokens: {"n": "size"},
    patterns.Prefix: {"n": "size"},
    shifted.ShiftedBlocks: {"size": "size", "query": "shift", "key": "shift"},
    shifted.Residue: {"step": "size", "offset": "length"},
    rows.EveryRow: {"part": "mask", "step": "size", "shift": "shift"},
    structured.BlockCausal: {"size": "size"},
    structured.BlockDiffusion: {"size": "size", "length": "size"},
    structured.GlobalPlaces: {"places": "tensor"},
    structured.Tree: {"parents": "tensor", "prefix": "tensor"},
    algebra.And: {"parts": "masks"},
    algebra.Or: {"parts": "masks"},
    held.PerHead: {"parts": "masks"},
    algebra.Not: {"part": "mask"},
    grids.Neighborhood: {"axes": "axes"},
    held.Documents: {"ids": "tensor"},
    held.Packed: {"cu_seqlens": "tensor"},
    varlen.Varlen: {
        "rule": "mask",
        **dict.fromkeys(("first", "last", "start", "place"), "tensor"),
        "keys": "length",
    },
    held.Kept: {"keep": "tensor"},
    words.Queries: {"which": "tensor"},
    held.Lengths: {"n": "tensor", "words": "words"},
    held.Dense: {"tensor": "tensor"},
    selection.Chosen: {"tiles": "tensor", "T": "length", "S": "length", "block": "block"},
}
"""The masks of this library, and what each of their fields is."""
_KINDS = {kind.__name__: kind for kind in _NUMBERS}
_AGAIN: dict[type[Mask], Callable[..., Mask]] = {
    held.PerHead: lambda parts: masks.per_head(parts),
    held.Documents: lambda ids: masks.documents(ids),
    held.Packed: lambda cu_seqlens: held.Packed.of(cu_seqlens),
    structured.GlobalPlaces: lambda places: masks.global_tokens(places),
    structured.Tree: lambda parents, prefix: masks.tree(parents, prefix=prefix),
    held.Kept: lambda keep: masks.padding(keep),
    words.Queries: lambda which: masks.queries(which),
    held.Lengths: lambda n, words: held.Lengths(masks.prefix(n).n, words),  # type: ignore[attr-defined]
    held.Dense: lambda tensor: masks.dense(tensor),
    selection.Chosen: lambda tiles, T, S, block: masks.chosen(tiles, T, S, tuple(block)),
}
"""The public functions, which look at what they are given; the other masks' classes take numbers alone."""


def mask_as_data(mask: Mask, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A mask of this library as a tree; its tensors are added to `tensors`, and stand in the tree by name."""
    if type(mask) not in _NUMBERS:
        _refuse(repr(mask), "is a rule in code", "a mask of regard.masks, such as masks.dense(mask.dense(T))")
    data: dict[str, Any] = {"mask": type(mask).__name__}
    for name, kind in _NUMBERS[type(mask)].items():
        value = getattr(mask, name)
        if kind == "masks":
            data[name] = [mask_as_data(part, tensors) for part in value]
        elif kind == "mask":
            data[name] = mask_as_data(value, tensors)
        elif kind == "tensor":
            data[name] = f"mask{len(tensors)}"
            tensors[data[name]] = value
        elif kind == "axes":
            data[name] = [[getattr(axis, f.name) for f in fields(axis)] for axis in value]
        else:
            data[name] = None if value == math.inf else list(value) if kind == "block" else value
    return data


def mask_from_data(data: Any, tensors: Mapping[str, Tensor]) -> Mask:
    """The mask again. Raises ValueError or TypeError where there is none."""
    named = entries(data, "a mask", {"mask"}, more=True)["mask"]
    choice(WHO, sorted(_KINDS), mask=named if isinstance(named, str) else repr(named))
    kind = _KINDS[named]
    given = entries(data, f"the mask {named!r}", {"mask", *_NUMBERS[kind]})
    found = {name: _field(name, what, given[name], tensors) for name, what in _NUMBERS[kind].items()}
    return _AGAIN.get(kind, kind)(**found)


def _field(name: str, kind: str, value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if kind == "masks":
        if not isinstance(value, list) or not value:
            refuse(WHO, name, "is no list of masks", _short(value), "at least one mask")
        return tuple(mask_from_data(part, tensors) for part in value)
    if kind == "mask":
        return mask_from_data(value, tensors)
    if kind == "words":
        return _word(value, name)
    if kind == "tensor":
        if _word(value, name) not in tensors:
            refuse(WHO, name, "names no tensor of the file", repr(value), "one of its masks' tensors")
        return tensors[value]
    if kind == "axes":
        columns = list(zip(*value)) if isinstance(value, list) and {len(a) for a in value} == {5} else []
        return grids.axes_of("neighborhood", *map(list, columns)) if columns else _refuse(name, "are no axes", "5 each")
    if kind == "block":
        whole(WHO, most=LARGEST, **{f"{name}{n}": size for n, size in enumerate(value)})
        return value
    if kind == "distance":
        if value is None:
            return math.inf
        whole(WHO, -LARGEST, most=LARGEST, **{name: value})
        return value
    if kind == "shift":
        whole(WHO, -LARGEST, most=LARGEST, **{name: value})
        return value
    whole(WHO, 0 if kind == "length" else 1, most=LARGEST, **{name: value})
    return value


# --- what comes out ------------------------------------------------------------------------------------------

_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}


def differences(made: Any, want: Any, where: str = "") -> list[str]:
    """Where two parts differ in anything but their tensors' values, which are kept by themselves."""
    if type(made) is not type(want):
        return [f"{where} is {type(want).__name__}, not {type(made).__name__}"]
    if isinstance(made, nn.Module):
        ours, theirs = _tensors(made), _tensors(want)
        found = [f"{where}.{name}" for name in ours.keys() ^ theirs.keys()]
        found += [f"{where}.{name}" for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]]
        for name in made._modules.keys() | want._modules.keys():
            found += differences(made._modules.get(name), want._modules.get(name), f"{where}.{name}")
        return found + _unlike({k: v for k, v in vars(made).items() if k not in _STATE},
                               {k: v for k, v in vars(want).items() if k not in _STATE}, where)  # fmt: skip
    if isinstance(made, Mask):
        return _unlike({f.name: getattr(made, f.name) for f in fields(made)},  # type: ignore[arg-type]
                       {f.name: getattr(want, f.name) for f in fields(want)}, where)  # fmt: skip
    if isinstance(made, Tensor):
        same = made.shape == want.shape and made.dtype == want.dtype and torch.equal(made.cpu(), want.cpu())
        return [] if same else [where]
    if isinstance(made, Mapping):
        return _unlike(made, want, where)
    if isinstance(made, list | tuple):
        return _unlike(dict(enumerate(made)), dict(enumerate(want)), where)
    return [] if made == want else [where]


_STATE = _OF_TORCH | {"x", "training", "supports", "name"}
"""What is no part of what a part is: torch's own, the tokens at hand, and what `create` writes on it."""


def _unlike(made: Mapping[Any, Any], want: Mapping[Any, Any], where: str) -> list[str]:
    found = [f"{where}.{name}" for name in made.keys() ^ want.keys()]
    for name in made.keys() & want.keys():
        found += differences(made[name], want[name], f"{where}.{name}")
    return found


def _tensors(module: nn.Module) -> dict[str, tuple[str, torch.Size]]:
    named: list[tuple[str, str, Tensor | None]] = [("parameter", *pair) for pair in module._parameters.items()]
    named += [("buffer", *pair) for pair in module._buffers.items()]
    return {name: (kind, t.shape) for kind, name, t in named if t is not None}


def unlike(made: Parts, want: Parts) -> list[str]:
    """Where two layers' parts differ in anything but their tensors' values."""
    return sorted(differences(made, want, "parts"))


# --- data that somebody wrote --------------------------------------------------------------------------------


def entries(data: Any, what: str, keys: set[str], *, more: bool = False) -> dict[str, Any]:
    """Refuse what is no object with exactly these keys (with `more`: at least these)."""
    if not isinstance(data, dict):
        refuse(WHO, what, "is no object", _short(data), f"one with {', '.join(sorted(keys))}")
    if missing := keys - data.keys():
        refuse(WHO, what, f"lacks {sorted(missing)[0]!r}", _short(sorted(data)), ", ".join(sorted(keys)))
    if not more and (odd := data.keys() - keys):
        refuse(WHO, what, "has an unknown key", _short(sorted(odd)[0]), ", ".join(sorted(keys)))
    return data


def _word(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) > 4096:
        refuse(WHO, what, "is no text", _short(value), "text of at most 4096 characters")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _text(spec: Spec, what: str) -> str:
    """As it is written; refused where it would not be read as the same."""
    try:
        if parse(str(spec)) == spec:
            return str(spec)
    except ValueError:
        pass
    _refuse(what, "has an option that is no number, text, True, False or None", "options that can be written down")


def _refuse(name: str, wrong: str, expected: str) -> NoReturn:
    raise ValueError(f"save: {name} {wrong}, so that it can't be written as data; expected {expected}")
