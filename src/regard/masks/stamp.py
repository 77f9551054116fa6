"""When a tensor was last written into, as far as torch can tell."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


def stamp(t: Tensor) -> tuple[Any, ...] | None:
    """Changes whenever t's numbers do. None where torch does not count the writes: inference mode, and memory that
    belongs to somebody else, as NumPy."""
    if type(t) not in (Tensor, torch.nn.Parameter) or t.is_inference() or not t.untyped_storage().resizable():
        return None
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype, t._version


def made_of(field: str) -> Callable[[Callable[[Any], R]], Any]:
    """A property that is made of the tensor in that field, once until the tensor is written into."""

    def decorate(make: Callable[[Any], R]) -> Any:
        name = f"_made_{make.__name__}"

        def get(self: Any) -> R:
            now = None if torch.compiler.is_compiling() else stamp(getattr(self, field))
            kept = vars(self).get(name)
            if now is not None and kept is not None and kept[0] == now:
                return kept[1]
            made = make(self)
            if now is not None:
                object.__setattr__(self, name, (now, made))
            return made

        get.__doc__ = make.__doc__
        return property(get)

    return decorate
