"""Mechanisms as people write them, read and printed alike everywhere: names, and options in brackets.

    softmax      window(window=64)      window(window=32)+rotary(base=500)      mypackage.attention:MyMixer(rank=4)

Options stand behind the part that they belong to. A name with a colon is the caller's own `module:callable`.
"""

import ast
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

_NAME = re.compile(r"[A-Za-z_][\w.-]*(:[A-Za-z_]\w*)?")
_PAIRS = {"(": ")", "[": "]", "{": "}"}
LONGEST, DEEPEST = 4096, 16
"""Characters of a mechanism, and brackets within brackets."""
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


class _Wrong(Exception):
    """What cannot be read, and from which character of the text on."""

    def __init__(self, at: int, why: str) -> None:
        super().__init__(why)
        self.at, self.why = at, why


def parse(text: str, what: str = "mechanism") -> Spec:
    """Read 'window(window=64)+rotary'. Option values are Python literals; `what` it is, messages say.

    Raises:
        ValueError: for whatever `Spec` could not print again as it is written here; it says where and why.
    """
    try:
        pieces = list(_pieces(text, "+"))
        parts = tuple(_part(piece, at) for at, piece in pieces)
        for (at, _), part in zip(pieces, parts):
            if len(parts) > 1 and ":" in part.name:
                raise _Wrong(at, "the caller's own is joined to nothing")
    except _Wrong as wrong:
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise ValueError(
            f"{what} cannot be read (got {shown!r}); at character {wrong.at + 1}: {wrong.why}; expected a name, or "
            "name(option=value, ...) with numbers, quoted text, True or False as values"
            + ("; names of the catalogue may be joined by '+'" if what == "mechanism" else "")
        ) from None
    return Spec(parts)


def single(text: str, what: str) -> Part:
    """Read what cannot be joined, as a task."""
    part, *others = parse(text, what).parts
    if others:
        raise ValueError(f"{what} cannot be joined by '+' (got {text!r}); expected one name, with options in brackets")
    return part


def split(text: str) -> list[str]:
    """Cut a comma-separated list, leaving the commas inside brackets and quotes alone."""
    try:
        return [piece.strip() for _, piece in _pieces(text, ",", longest=len(text)) if piece.strip()]
    except _Wrong:  # whoever reads it says what is wrong
        return [text]


def _part(text: str, at: int) -> Part:
    """One name and its options; `at` is where it begins in what was written."""
    name, bracket, inside = text.partition("(")
    start = at + len(name) - len(name.lstrip())
    if not _NAME.fullmatch(name.strip()):
        raise _Wrong(start, f"{name.strip()[:_SHOWN]!r} is no name" if name.strip() else "a name is missing")
    if not bracket:
        return Part(name.strip())
    if (behind := text[(closed := _closing(text)) :]).strip():
        raise _Wrong(at + closed, f"{behind[:_SHOWN]!r} follows the bracket")
    # Only the brackets are parsed: in the name, ':' and '.' mean nothing to Python.
    code, shift = f"f({inside.rstrip()}", at + len(name) - 1

    def place(node: ast.AST) -> int:
        return shift + len(code.encode()[: getattr(node, "col_offset", 0)].decode())

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that mean nothing
            call = ast.parse(code, mode="eval").body
    except SyntaxError as error:
        raise _Wrong(shift + max(2, (error.offset or 1) - 1), error.msg) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise _Wrong(shift + 2, str(error) or type(error).__name__) from None
    if not isinstance(call, ast.Call):
        raise _Wrong(shift + 2, "it is no list of options")
    if call.args:
        raise _Wrong(place(call.args[0]), "a value without the name of its option")
    options: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in options:
            raise _Wrong(place(keyword), f"{keyword.arg} stands here twice" if keyword.arg else "'**' is no option")
        options[keyword.arg] = _value(keyword.value, place)
    return Part(name.strip(), options)


def _value(node: ast.expr, place: Callable[[ast.AST], int]) -> Any:
    """A literal, whose repr is read as the same."""
    match node:
        case ast.Constant(value=bool() | int() | str() | None as value):
            return value
        case ast.Constant(value=float() as number) if math.isfinite(number):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=(int() | float()) as number)) if not isinstance(
            number, bool
        ) and math.isfinite(number):
            return -number
        case ast.Tuple():
            return tuple(_value(one, place) for one in node.elts)
        case ast.List():
            return [_value(one, place) for one in node.elts]
        case ast.Dict():
            read: dict[Any, Any] = {}
            for named, item in zip(node.keys, node.values):
                if not isinstance(named, ast.Constant) or (key := _value(named, place)) in read:
                    raise _Wrong(place(named or item), "a name in braces is a number or text, and stands there once")
                read[key] = _value(item, place)
            return read
    raise _Wrong(place(node), "no such value")


def _closing(text: str) -> int:
    """Behind the bracket that closes the first."""
    depth, quote, escaped = 0, "", False
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote and not escaped else quote
            escaped = letter == "\\" and not escaped
        elif letter in "'\"":
            quote = letter
        elif letter in "([{)]}":
            depth += 1 if letter in _PAIRS else -1
            if depth == 0:
                return at + 1
    return len(text)


def _pieces(text: str, sign: str, *, longest: int = LONGEST) -> Iterator[tuple[int, str]]:
    """The text cut where the sign stands outside all brackets and quotes, and where each piece begins."""
    start, closing, quote, escaped = 0, [], "", False
    if len(text) > longest:
        raise _Wrong(longest, f"it is longer than {longest} characters")
    for at, letter in enumerate(text):
        if letter < " " or (letter == "#" and not quote) or "\ud800" <= letter <= "\udfff":
            raise _Wrong(at, f"{letter!r} says nothing here")
        if quote:
            quote = "" if letter == quote and not escaped else quote
            escaped = letter == "\\" and not escaped
        elif letter in "'\"":
            quote = letter
        elif letter in _PAIRS:
            closing.append(_PAIRS[letter])
            if len(closing) > DEEPEST:
                raise _Wrong(at, f"brackets are deeper than {DEEPEST}")
        elif letter in ")]}":
            if not closing or letter != closing.pop():
                raise _Wrong(at, f"{letter!r} closes nothing")
        elif letter == sign and not closing:
            yield start, text[start:at]
            start = at + 1
    if quote or closing:
        raise _Wrong(len(text), f"{quote or closing[-1]!r} is missing")
    yield start, text[start:]
