"""Every attention mechanism worth knowing behind one interface."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

from regard import kinds, masks
from regard.attention import Attention, attention, plan
from regard.cache import KVCache
from regard.card import Card, Cost, Paper, register
from regard.catalog import card, create, mechanisms
from regard.kernels import Plan

if TYPE_CHECKING:
    from regard import inspect
    from regard.inspect.trace import trace
    from regard.integrations.transformers import swap

__all__ = [
    "Attention",
    "Card",
    "Cost",
    "KVCache",
    "Paper",
    "Plan",
    "attention",
    "card",
    "create",
    "inspect",
    "kinds",
    "masks",
    "mechanisms",
    "plan",
    "register",
    "swap",
    "trace",
]

_LATER = {
    "inspect": "regard.inspect",
    "swap": "regard.integrations.transformers:swap",
    "trace": "regard.inspect.trace:trace",
}
"""What is imported when it is first asked for, as `import regard` must be quick."""


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _LATER[name].partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found
