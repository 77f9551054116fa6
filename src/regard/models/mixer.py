"""Modules of mechanisms as `regard.spec` reads them: those of the catalogue, and the caller's own.

The caller's own `module:callable` is called as `callable(dim=, num_heads=, causal=, **options)`.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from regard.spec import Part, Spec, parse, split

if TYPE_CHECKING:  # so that names are read without torch
    from torch import nn

__all__ = ["Part", "Spec", "build", "factory", "find", "look_here", "parse", "protocol", "split"]


def build(spec: Spec, dim: int, num_heads: int, *, causal: bool = True) -> "nn.Module":
    """One module of this mechanism; by default a causal token mixer (B, T, M) -> (B, T, M)."""
    if not spec.own:
        from regard import create

        return create(str(spec), dim=dim, num_heads=num_heads, causal=causal)
    given = {"dim": dim, "num_heads": num_heads, "causal": causal}
    options = spec.parts[0].options
    if twice := sorted(given.keys() & options.keys()):
        said = ", ".join(f"{name} = {options[name]!r}" for name in twice)
        raise ValueError(f"mechanism {spec.name}: options hold what is set for all alike (got {said}); leave it out")
    return factory(spec)(**given, **options)


def look_here() -> None:
    """Find the caller's own modules where the command is given, too."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def find(spec: Spec) -> None:
    """Refuse the caller's own module that is not there, without running it."""
    top = spec.name.partition(":")[0].partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        raise ValueError(f"mechanism {spec.name!r}: No module named {top!r}")


def factory(spec: Spec) -> "Callable[..., nn.Module]":
    """The caller's own callable."""
    module, _, attribute = spec.name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"mechanism {spec.name!r}: {error}") from error


def protocol(spec: Spec) -> str:
    """What kind of module it makes. The caller's own says so in an attribute `protocol`, or is a TokenMixer."""
    if spec.own:
        return getattr(factory(spec), "protocol", "TokenMixer")
    from regard import catalog

    return catalog.card(spec.names[0]).protocol
