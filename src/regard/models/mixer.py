"""Modules of mechanisms as `regard.spec` reads them: those of the catalogue, and the caller's own.

The caller's own `module:callable` is called as `callable(dim=, num_heads=, causal=, **options)`.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from regard.checks import flag, whole
from regard.spec import Mechanism, Part, Spec, Stack, parse, parse_stack, split

if TYPE_CHECKING:  # so that names are read without torch
    from torch import nn

__all__ = [
    "Mechanism",
    "Part",
    "Spec",
    "Stack",
    "build",
    "factory",
    "find",
    "layers",
    "look_here",
    "parse",
    "parse_stack",
    "protocol",
    "split",
]


def layers(
    mechanism: str | Mechanism, *, dim: int, num_heads: int, depth: int, causal: bool = False, share_kv: int = 1
) -> "list[nn.Module]":
    """The mixers of a model's layers: `layers("linear*3+softmax", dim=512, num_heads=8, depth=8, causal=True)`.

    A mechanism alone, as `regard.create` takes it, or the caller's own, stands in every layer. With '*' it is a pattern
    that repeats down the model, as in Jamba; where `depth` is no multiple of its layers the last repetition is cut, as
    in RecurrentGemma. Parameters that a paper has once for all layers are each layer's own: `regard.share(*layers)`
    ties them.

    Args:
        share_kv: of every so many layers the first makes keys and values, and the others, `regard.pipeline.SharedKV`,
            read those, as in Cross-Layer Attention; 1: each has its own. `LanguageModel` hands them on.

    Raises:
        ValueError: what `parse_stack` and `regard.create` refuse, a depth below the layers of the pattern, and layers
            that can't share.
    """
    flag("layers", causal=causal)
    whole("layers", share_kv=share_kv)
    mechanism = parse_stack(mechanism) if isinstance(mechanism, str) else mechanism
    made = [build(spec, dim, num_heads, causal=causal) for spec in mechanism.layers(depth)]
    if share_kv == 1:
        return made
    from regard.pipeline.shared_kv import SharedKV, check_shared

    made = [SharedKV.of(layer) if n % share_kv else layer for n, layer in enumerate(made)]
    check_shared(made)
    return made


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
