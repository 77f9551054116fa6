"""Mechanisms as people write them on a command line: a name, and options in brackets.

    softmax      gated+rotary      window(size=64)      mypackage.attention:MyMixer(rank=4)

A name with a colon is the caller's own `module:callable`, called as
`callable(dim=, num_heads=, causal=, **options)`.
"""

import ast
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # so that names are read without torch
    from torch import nn

_NAME = re.compile(r"[A-Za-z_][\w.+-]*(:[A-Za-z_]\w*)?")


@dataclass(frozen=True)
class Spec:
    """A mechanism and its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def own(self) -> bool:
        """Whether it is the caller's own code rather than a card of the catalogue."""
        return ":" in self.name

    def __str__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.name}({inside})" if inside else self.name


def parse(text: str, what: str = "mechanism") -> Spec:
    """Read 'window(size=64)'. Option values are Python literals; `what` it is, messages say."""
    name, bracket, inside = text.strip().partition("(")
    try:
        # Only the brackets are parsed: in the name, '+', ':' and '.' mean nothing to Python.
        call = ast.parse("f(" + (inside if bracket else ")"), mode="eval").body
        if not _NAME.fullmatch(name.strip()) or not isinstance(call, ast.Call) or call.args:
            raise SyntaxError
        options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
        if len(options) < len(call.keywords):
            raise SyntaxError
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"{what} {text!r} cannot be read; expected a name, or name(option=value, ...) "
            "with numbers, quoted text, True or False as values"
        ) from error
    return Spec(name.strip(), options)


def split(text: str) -> list[str]:
    """Cut a comma-separated list, leaving the commas inside brackets alone."""
    parts = re.split(r",(?![^(]*\))", text)
    return [part.strip() for part in parts if part.strip()]


def build(spec: Spec, dim: int, num_heads: int, *, causal: bool = True) -> "nn.Module":
    """One module of this mechanism; by default a causal token mixer (B, T, M) -> (B, T, M)."""
    if not spec.own:
        from regard import create

        return create(spec.name, dim=dim, num_heads=num_heads, causal=causal, **spec.options)
    return factory(spec)(dim=dim, num_heads=num_heads, causal=causal, **spec.options)


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

    return catalog.card(spec.name.split("+")[0].strip()).protocol
