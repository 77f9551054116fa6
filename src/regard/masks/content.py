"""What was made of a mask, kept for as long as the mask's numbers are what they were.

Masks of numbers alone are equal where their numbers are. One that holds tensors is known by where their memory is and
by torch's count of the writes to it; the memory is watched, so that what is freed and used again is another mask. A
rule in code is known by its function, and by the tensors that this reads.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import lru_cache, update_wrapper
from threading import Lock
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from regard.masks.algebra import Mask, by_value
from regard.masks.flat import flatten
from regard.masks.stamp import stamp
from regard.masks.tensors import Predicate

P = ParamSpec("P")
R = TypeVar("R")


class Remembered(Generic[P, R]):
    """A function of a mask and more that can be hashed, whose last results are kept."""

    def __init__(self, make: Callable[Concatenate[Mask, P], R], size: int):
        update_wrapper(self, make)
        self.make, self.size = make, min(size, 8)  # of those with tensors, which can be large
        self.by_value = lru_cache(maxsize=size)(make)
        self.held: OrderedDict[Hashable, tuple[list[StorageWeakRef], R]] = OrderedDict()
        self.lock = Lock()

    def __call__(self, mask: Mask, *args: P.args, **kwargs: P.kwargs) -> R:
        if by_value(mask):
            return self.by_value(mask, *args, **kwargs)  # type: ignore[arg-type]
        key, tensors = known_by(mask, args)
        if key is None:
            return self.make(mask, *args, **kwargs)
        with self.lock:
            if key in self.held:
                self.held.move_to_end(key)
                return self.held[key][1]
        made = self.make(mask, *args, **kwargs)
        with self.lock:
            gone = [k for k, (refs, _) in self.held.items() if any(ref.expired() for ref in refs)]
            for k in [*gone, *list(self.held)[: max(0, len(self.held) - len(gone) - self.size + 1)]]:
                self.held.pop(k, None)
            self.held[key] = [StorageWeakRef(t.untyped_storage()) for t in tensors], made
        return made

    def knows(self, mask: Mask, *args: Any) -> bool:
        """Whether it need not be made, for a mask with tensors; one of numbers is made once at most."""
        return by_value(mask) or known_by(mask, args)[0] in self.held


def remembered(size: int) -> Callable[[Callable[Concatenate[Mask, P], R]], Remembered[P, R]]:
    """Keep the last `size` results of a function whose first argument is a mask."""
    return lambda make: Remembered(make, size)


def known_by(mask: Mask, rest: tuple[Any, ...]) -> tuple[Hashable, list[Tensor]]:
    """What tells this mask from any other, and its tensors; None where that can't be told."""
    if torch.compiler.is_compiling():
        return None, []
    flat, asked = _flat(mask)
    if flat is None:
        return None, []
    word, numbers, held = flat
    for rule in asked:  # anew each time: a function may find another tensor under the same name
        read = rule.reads()
        if read is None:
            return None, []
        held = held + read
    stamps = [stamp(t) for t in held]
    if None in stamps:
        return None, []
    return (word, *numbers, *(rule.function for rule in asked), *stamps, *rest), held


def _flat(mask: Mask) -> tuple[tuple[str, list[int], list[Tensor]] | None, list[Predicate]]:
    """`flatten`, once a mask: its fields never change, only what stands in their memory; and the rules in it."""
    kept = vars(mask)
    if "_flat" not in kept:
        asked: list[Predicate] = []
        object.__setattr__(mask, "_flat", (flatten(mask, asked), asked))
    return kept["_flat"]
