"""The tensors of one layer under two names, ours and those of the library that it comes from, and how one becomes the
other.

What a mechanism takes from a library's module stands in the mechanism's own file, under `@CARD.loads`: a function of
their module that says what ours is and which tensors go where. It reads sizes and settings, never values: the module
may be on the device 'meta'.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from regard.checks import refuse

if TYPE_CHECKING:
    from torch import Tensor, nn

    from regard.cards import Card

Moved = Callable[..., "Sequence[Tensor]"]


@dataclass(frozen=True)
class Move:
    """Some tensors of ours, and those of theirs that they are made of."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    load: Moved
    """Theirs, in order, to ours."""
    store: Moved | None
    """Ours to theirs, with every bit; None where it can't be had back."""


@dataclass(frozen=True)
class Loaded:
    """What a converter found in their module."""

    build: Callable[[], Any]
    """Makes the layer, the part of one, or, for what fills no slot, the keywords of `regard.Attention`."""
    moves: Sequence[Move] = ()
    """Names of a part's tensors begin with its slot."""


Converter = Callable[[Any], Loaded | None]
"""None: this module has no such part."""
C = TypeVar("C", bound=Callable[..., Loaded | None])


@dataclass(frozen=True)
class Loader:
    """One class of a library, what of it a card loads, and how."""

    card: "Card"
    library: str
    name: str
    convert: Converter


_loaders: dict[tuple[str, str, str], Loader] = {}


def register(card: "Card", library: str, names: Iterable[str], convert: C) -> C:
    """Say that the card loads modules of these classes."""
    for name in names:
        _loaders[card.name, library, name] = Loader(card, library, name, convert)
    return convert


def loaders() -> list[Loader]:
    """All that the files imported so far have said; `regard.catalog.cards` imports every one."""
    return list(_loaders.values())


# --- moves ---------------------------------------------------------------------------------------------------


def same(theirs: "nn.Module", names: Mapping[str, str]) -> list[Move]:
    """Tensors that have another name only: ours to theirs, of one tensor or of a child with all its tensors. What
    theirs does not have is left out."""
    held = theirs.state_dict(keep_vars=True)
    return [
        Move((ours + name.removeprefix(their),), (name,), _as_is, _as_is)
        for ours, their in names.items()
        for name in held
        if name == their or name.startswith(their + ".")
    ]


def joined(theirs: "nn.Module", ours: Sequence[str], name: str, load: Moved, store: Moved) -> list[Move]:
    """Children of ours that are one child of theirs, weight and bias alike."""
    held = theirs.state_dict(keep_vars=True)
    kinds = {f"{name}{sep}{kind}": kind for sep in "._" for kind in ("weight", "bias")}
    return [
        Move(tuple(f"{one}.{kind}" for one in ours), (their,), load, store)
        for their, kind in kinds.items()
        if their in held
    ]


def stacked(theirs: "nn.Module", ours: Sequence[str], name: str, rows: Sequence[int] | None = None) -> list[Move]:
    """Children of ours one below the other in one of theirs; `rows` of each, else equal parts."""
    import torch

    def load(t: "Tensor") -> "Sequence[Tensor]":
        return t.split(list(rows)) if rows is not None else t.tensor_split(len(ours))

    return joined(theirs, ours, name, load, lambda *parts: [torch.cat(parts)])


def woven(
    theirs: "nn.Module", ours: Sequence[str], name: str, heads: int, rows: Sequence[int] | None = None
) -> list[Move]:
    """Children of ours in one of theirs, where each head's `rows` of all follow one another; else equal parts."""
    import torch

    def load(t: "Tensor") -> "Sequence[Tensor]":
        each = t.unflatten(0, (heads, -1))
        parts = each.split(list(rows), 1) if rows is not None else each.tensor_split(len(ours), 1)
        return [part.flatten(0, 1) for part in parts]

    def store(*parts: "Tensor") -> "Sequence[Tensor]":
        return [torch.cat([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 1)]

    return joined(theirs, ours, name, load, store)


def transposed(moves: Iterable[Move]) -> list[Move]:
    """The same where matrices of theirs have inputs first, as transformers' Conv1D."""

    def turned(move: Move) -> Move:
        def load(*tensors: "Tensor") -> "Sequence[Tensor]":
            return move.load(*(t.mT if t.dim() == 2 else t for t in tensors))

        def store(*tensors: "Tensor") -> "Sequence[Tensor]":
            made = move.store(*tensors) if move.store is not None else ()
            return [t.mT if t.dim() == 2 else t for t in made]

        return replace(move, load=load, store=store if move.store is not None else None)

    return [turned(move) for move in moves]


def reshaped(ours: str, name: str, load: "Callable[[Tensor], Tensor]", store: "Callable[[Tensor], Tensor]") -> Move:
    """One tensor whose axes differ."""
    return Move((ours,), (name,), lambda t: [load(t)], lambda t: [store(t)])


def shapes(moves: Iterable[Move], theirs: "Mapping[str, tuple[int, ...]]") -> "dict[str, tuple[int, ...]]":
    """The shapes of our tensors, of theirs; nothing is allocated.

    Raises:
        ValueError: names theirs that have no such axes, and what they have.
    """
    import torch

    found: dict[str, tuple[int, ...]] = {}
    for move in moves:
        try:
            loaded = move.load(*(torch.empty(theirs[name], device="meta") for name in move.theirs))
        except (RuntimeError, IndexError) as error:
            got = ", ".join(f"{name} {tuple(theirs[name])}" for name in move.theirs)
            refuse("weights", "the shape", "does not fit", got, f"what {', '.join(move.ours)} are made of ({error})")
        found |= {name: tuple(t.shape) for name, t in zip(move.ours, loaded, strict=True)}
    return found


def shapes_of(theirs: "nn.Module") -> "dict[str, tuple[int, ...]]":
    """The shapes of a module's own tensors."""
    return {name: tuple(t.shape) for name, t in theirs.state_dict(keep_vars=True).items()}


def _as_is(*tensors: "Tensor") -> "Sequence[Tensor]":
    return tensors


# --- reading their modules -----------------------------------------------------------------------------------


def only(theirs: object, expected: Mapping[str, Any]) -> None:
    """Refuse a module, or config, with settings that ours can't follow: `only(theirs, {"residual": False})`. What it
    lacks is as expected."""
    for name, value in expected.items():
        if (got := getattr(theirs, name, value)) != value:
            refuse(theirs, name, "has no counterpart here", got, repr(value))


def setting(theirs: "nn.Module", *names: str, default: Any = None) -> Any:
    """The first of these that the module has, or else its config."""
    for holder in (theirs, getattr(theirs, "config", None)):
        for name in names:
            if (value := getattr(holder, name, None)) is not None:
                return value
    return default
