"""A pytest plugin under which models of transformers attend through regard as soon as they are made or loaded."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

import regard
from peers.counting import counted
from regard.integrations.transformers_attend import Attending

_depth = 0


@contextmanager
def _inside() -> Iterator[bool]:
    """Whether this is the outermost: models hold others, and from_pretrained makes them."""
    global _depth
    _depth += 1
    try:
        yield _depth == 1
    finally:
        _depth -= 1


def _swap(model: PreTrainedModel) -> None:
    regard.swap(model, "softmax", check=model.device.type != "meta")


def _made(make: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(make)
    def init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        with _inside() as outermost:
            make(self, *args, **kwargs)
        if outermost:
            _swap(self)

    return init


def _loaded(load: Any) -> classmethod:
    @functools.wraps(load.__func__)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        with _inside() as outermost:
            found = load.__func__(cls, *args, **kwargs)
        # Who asks for another implementation by its name compares with it.
        if outermost and kwargs.get("attn_implementation") in (None, "sdpa"):
            _swap(found[0] if isinstance(found, tuple) else found)
        return found

    return classmethod(from_pretrained)


def pytest_collection_modifyitems(items: list) -> None:
    """Patch the classes that the tests are about."""
    for cls in {c for item in items for c in getattr(item.cls, "all_model_classes", ())}:
        cls.__init__ = _made(cls.__init__)
    PreTrainedModel.from_pretrained = _loaded(PreTrainedModel.__dict__["from_pretrained"])
    Attending.attend = counted(Attending.attend)
    torch.set_num_threads(1)
