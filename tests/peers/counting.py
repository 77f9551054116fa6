"""A pytest plugin that writes for each test whether regard did some of its work."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

CALLS: list[str] = []
"""What was called of regard in this test, by name."""


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose calls are known here."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # a graph would hold how long the list is
            CALLS.append(function.__name__)
        return function(*args, **kwargs)

    return call


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fresh seeds for each test, so that the two runs, and their workers, draw the same numbers."""
    CALLS.clear()
    torch.manual_seed(0)
    try:
        return (yield)
    finally:
        item.user_properties.append(("regard", len(CALLS)))
