"""A mask of this library as one word, its numbers and its tensors, and back: for operators, which take no objects.

The word names classes and what their fields are, in order; the fields' values stand beside it, so that one word serves
masks of every size.
"""

import inspect
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from regard.masks import algebra, grids, lists, patterns, rows, selection, shifted, structured, tensors, varlen, words
from regard.masks.algebra import Mask

KINDS: dict[str, type] = {
    name: kind
    for room in (algebra, grids, lists, patterns, rows, selection, shifted, structured, tensors, varlen, words)
    for name, kind in vars(room).items()
    if inspect.isclass(kind) and kind.__module__ == room.__name__ and hasattr(kind, "__dataclass_fields__")
}
"""The classes that a word may name: masks, and what they are made of."""
CONSTANTS: dict[str, Any] = {"None": None, "True": True, "False": False, "inf": math.inf}


def flatten(mask: Mask, rules: list[tensors.Predicate] | None = None) -> tuple[str, list[int], list[Tensor]] | None:
    """The word, numbers and tensors; None for a rule in code, as anybody's own mask is.

    Args:
        rules: takes the rules of `predicate`; there is no way back from such a word.
    """
    numbers: list[int] = []
    held: list[Tensor] = []
    word = _word(mask, numbers, held, rules)
    return None if word is None else (word, numbers, held)


def unflatten(word: str, numbers: Sequence[int], held: Sequence[Tensor]) -> Mask:
    """The mask again."""
    return _value(iter(word.split()), iter(numbers), iter(held))


def _word(
    value: Any, numbers: list[int], held: list[Tensor], rules: list[tensors.Predicate] | None = None
) -> str | None:
    """The words of one field's value, space between them; None where it can't be said."""
    if rules is not None and isinstance(value, tensors.Predicate) and isinstance(value.function, Hashable):
        rules.append(value)
        numbers.extend((*value.sizes, value.shift))
        return "rule"
    if isinstance(value, Tensor):
        held.append(value)
        return "tensor"
    if isinstance(value, int) and not isinstance(value, bool):
        numbers.append(value)
        return "int"
    if isinstance(value, str):  # only how it is shown
        return "str"
    for word, constant in CONSTANTS.items():
        if value is constant or value == constant == math.inf:
            return word
    if isinstance(value, tuple):
        name, parts = f"tuple {len(value)}", list(value)
    elif KINDS.get(name := type(value).__name__) is type(value):
        parts = [getattr(value, field.name) for field in fields(value)]
    else:
        return None
    for part in parts:
        said = _word(part, numbers, held, rules)
        if said is None:
            return None
        name = f"{name} {said}"
    return name


def _value(words: Iterator[str], numbers: Iterator[int], held: Iterator[Tensor]) -> Any:
    word = next(words)
    if word == "tuple":
        return tuple(_value(words, numbers, held) for _ in range(int(next(words))))
    if word in KINDS:
        kind = KINDS[word]
        return kind(*(_value(words, numbers, held) for _ in fields(kind)))
    if word in CONSTANTS:
        return CONSTANTS[word]
    return "" if word == "str" else next(held if word == "tensor" else numbers)
