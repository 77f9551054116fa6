"""Mechanisms as people write them, read and printed alike everywhere: names, and options in brackets.

    softmax      window(window=64)      window(window=32)+rotary(base=500)      mypackage.attention:MyMixer(rank=4)

Options stand behind the part that they belong to. A name with a colon is the caller's own `module:callable`.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_NAME = re.compile(r"[A-Za-z_][\w.-]*(:[A-Za-z_]\w*)?")
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_SHOWN = 80
"""Characters of a text that a message repeats."""


@dataclass(frozen=True)
class Part:
    """One name and its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.name}({inside})" if inside else self.name


@dataclass(frozen=True)
class Spec:
    """A mechanism: one part, or several joined by '+'. `parse(str(spec)) == spec`."""

    parts: tuple[Part, ...]

    @property
    def names(self) -> list[str]:
        return [part.name for part in self.parts]

    @property
    def name(self) -> str:
        """The names joined, without options."""
        return "+".join(self.names)

    @property
    def options(self) -> dict[str, Any]:
        """All options that are written, of whichever part: what a part is told is in `parts`."""
        return {name: value for part in self.parts for name, value in part.options.items()}

    @property
    def own(self) -> bool:
        """Whether it is the caller's own code rather than cards of the catalogue."""
        return ":" in self.name

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))


def parse(text: str, what: str = "mechanism") -> Spec:
    """Read 'window(window=64)+rotary'. Option values are Python literals; `what` it is, messages say.

    Raises:
        ValueError: for whatever `Spec` could not print again as it is written here.
    """
    try:
        parts = tuple(map(_part, _pieces(text, "+")))
        if len(parts) > 1 and any(":" in part.name for part in parts):
            raise SyntaxError
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise ValueError(
            f"{what} cannot be read (got {shown!r}); expected a name, or name(option=value, ...) "
            "with numbers, quoted text, True or False as values"
            + ("; names of the catalogue may be joined by '+'" if what == "mechanism" else "")
        ) from error
    return Spec(parts)


def single(text: str, what: str) -> Part:
    """Read what cannot be joined, as a task."""
    part, *others = parse(text, what).parts
    if others:
        raise ValueError(f"{what} cannot be joined by '+' (got {text!r}); expected one name, with options in brackets")
    return part


def split(text: str) -> list[str]:
    """Cut a comma-separated list, leaving the commas inside brackets and quotes alone."""
    return [part for part in _pieces(text, ",") if part]


def _part(text: str) -> Part:
    name, bracket, inside = text.partition("(")
    # Only the brackets are parsed: in the name, ':' and '.' mean nothing to Python.
    code = "f(" + (inside if bracket else ")")
    call = ast.parse(code, mode="eval").body
    plain = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
    if not _NAME.fullmatch(name.strip()) or not plain or call.end_col_offset != len(code.encode()):
        raise SyntaxError  # what a bracket is followed by, a comment too, would be left out
    options: dict[str, Any] = {}
    for keyword in call.keywords:  # type: ignore[attr-defined]
        value = ast.literal_eval(keyword.value)
        if keyword.arg is None or keyword.arg in options or ast.literal_eval(repr(value)) != value:
            raise SyntaxError  # the last as 1e999, which is printed as inf
        options[keyword.arg] = value
    return Part(name.strip(), options)


def _pieces(text: str, sign: str) -> Iterator[str]:
    """The text cut where the sign stands outside all brackets and quotes."""
    start, closing, quote, escaped = 0, [], "", False
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote and not escaped else quote
            escaped = letter == "\\" and not escaped
        elif letter in "'\"":
            quote = letter
        elif letter in _PAIRS:
            closing.append(_PAIRS[letter])
        elif closing:
            if letter == closing[-1]:
                closing.pop()
        elif letter == sign:
            yield text[start:at].strip()
            start = at + 1
    yield text[start:].strip()
