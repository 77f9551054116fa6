"""Mechanisms as people write them, read and printed alike everywhere: names, and options in brackets.

    softmax      window(window=64)      window(window=32)+rotary(base=500)      mypackage.attention:MyMixer(rank=4)

Options stand behind the part that they belong to. A name with a colon is the caller's own `module:callable`.

Where a model's layers differ, '*' says how many of a kind follow each other, '+' then joins layers, and the parts of
one layer stand in brackets:

    linear*3+softmax      (window(window=64)+rotary)*5+rotary      softmax*1+gated*1

That is a pattern, which repeats down the model.
"""

import ast
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from regard.checks import refuse, whole

_NAME = re.compile(r"[A-Za-z_][\w.-]*(:[A-Za-z_]\w*)?")
_PAIRS = {"(": ")", "[": "]", "{": "}"}
LONGEST, DEEPEST = 4096, 16
"""Characters of a mechanism, and brackets within brackets."""
MOST = 1024
"""Layers of a pattern."""
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

    @property
    def kinds(self) -> "list[Spec]":
        """The mechanisms of a model's layers, each once: this one."""
        return [self]

    def layers(self, depth: int) -> "list[Spec]":
        """The mechanism of each of so many layers."""
        whole(str(self), depth=depth)
        return [self] * depth

    def cut(self, depth: int) -> str:
        """Nothing to say: it is the same in all layers."""
        return ""

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))


@dataclass(frozen=True)
class Stack:
    """What a model's layers are, one after the other, again and again. `parse_stack(str(stack)) == stack`."""

    pattern: tuple[Spec, ...]
    """At least two layers; alone, a layer is its Spec."""

    @property
    def kinds(self) -> list[Spec]:
        """The mechanisms in it, each once."""
        return list({str(spec): spec for spec in self.pattern}.values())

    @property
    def names(self) -> list[str]:
        """All names in it, each once."""
        return list(dict.fromkeys(name for spec in self.pattern for name in spec.names))

    @property
    def name(self) -> str:
        """The pattern without options."""
        return _pattern([(spec.name, len(spec.parts)) for spec in self.pattern])

    @property
    def own(self) -> bool:
        """Whether the caller's own code is among them."""
        return any(spec.own for spec in self.pattern)

    def layers(self, depth: int) -> list[Spec]:
        """The mechanism of each of so many layers: the pattern repeats, and its last repetition may be cut.

        Raises:
            ValueError: a model of fewer layers than the pattern has, which would not be what its name says.
        """
        whole(str(self), depth=depth)
        if depth < (least := len(self.pattern)):
            refuse(str(self), "depth", f"is less than the {least} layers of the pattern", depth, f"an int >= {least}")
        return [self.pattern[n % least] for n in range(depth)]

    def cut(self, depth: int) -> str:
        """In words, what so many layers are where the last repetition is cut; else ''."""
        if depth % len(self.pattern) == 0:
            return ""
        return f"{self} is cut at {depth} layers, which are {Stack(tuple(self.layers(depth)))}"

    def __str__(self) -> str:
        return _pattern([(str(spec), len(spec.parts)) for spec in self.pattern])


Mechanism = Spec | Stack
"""What stands in the layers of a model: one mechanism in all, or a pattern of several."""


def _pattern(layers: list[tuple[str, int]]) -> str:
    """Layers, each with its number of parts, as a pattern: neighbours that are alike are counted."""
    runs = [(f"({text})" if parts > 1 else text, len(list(run))) for (text, parts), run in groupby(layers)]
    alone = max(times for _, times in runs) == 1  # without any '*', '+' would join parts
    return "+".join(f"{text}*{times}" if times > 1 or alone else text for text, times in runs)


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
        return _layer(text, 0)
    except _Wrong as wrong:
        if what == "mechanism" and (stack := _stack(text)):
            raise ValueError(
                f"mechanism is several layers (got {_shown(text)!r}); expected one, such as {str(stack.kinds[0])!r}; "
                "`regard compare`, LMConfig and regard.models.layers take several"
            ) from None
        raise ValueError(_unreadable(text, what, wrong)) from None


def parse_stack(text: str) -> Mechanism:
    """Read what stands in the layers of a model: one mechanism, or several as in 'linear*3+softmax'.

    Raises:
        ValueError: as `parse`.
    """
    try:
        if len(list(_pieces(text, "*"))) == 1:
            return parse(text)
        pattern: list[Spec] = []
        for at, piece in _pieces(text, "+"):
            pattern += _run(piece, at, MOST - len(pattern))
    except _Wrong as wrong:
        raise ValueError(_unreadable(text, "mechanism", wrong)) from None
    return Stack(tuple(pattern)) if len(pattern) > 1 else pattern[0]


def _stack(text: str) -> Mechanism | None:
    """What a text says that has a '*'; None where it can't be read, or has none."""
    try:
        return parse_stack(text) if len(list(_pieces(text, "*"))) > 1 else None
    except (_Wrong, ValueError):
        return None


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _unreadable(text: str, what: str, wrong: _Wrong) -> str:
    expected = "a name, or name(option=value, ...) with numbers, quoted text, True or False as values"
    if what == "mechanism":
        expected += "; names of the catalogue may be joined by '+'"
        expected += ", and layers as in '(gated+rotary)*2+softmax'" * ("*" in text or text.startswith("("))
    return (
        f"{what} cannot be read (got {_shown(text)!r}); at character {wrong.at + 1}: {wrong.why}; expected {expected}"
    )


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


def _run(text: str, at: int, most: int) -> list[Spec]:
    """Layers that are alike, 'linear*3' or '(gated+rotary)*2'; of one, the number may be missing."""
    (_, layer), *repeats = ((at + start, piece) for start, piece in _pieces(text, "*"))
    if len(repeats) > 1:
        raise _Wrong(repeats[1][0] - 1, "'*' stands here twice")
    times = 1
    for start, number in repeats:
        start += len(number) - len(number.lstrip())
        if not re.fullmatch("[1-9][0-9]*", number.strip()):
            said = f"{number.strip()[:_SHOWN]!r} is no number of layers" if number.strip() else "a number is missing"
            raise _Wrong(start, said)
        if len(number.strip()) > len(str(MOST)) or (times := int(number)) > most:
            raise _Wrong(start, f"the layers are more than {MOST}")
    if most < 1:
        raise _Wrong(at, f"the layers are more than {MOST}")
    if not layer.lstrip().startswith("("):
        return [_layer(layer, at)] * times
    start = at + layer.index("(") + 1
    end = _closing(layer)
    if (behind := layer[end:]).strip():
        raise _Wrong(at + end, f"{behind.strip()[:_SHOWN]!r} follows the bracket")
    inside = layer[layer.index("(") + 1 : end - 1]
    for again, _ in [*_pieces(inside, "*")][1:]:
        raise _Wrong(start + again - 1, "layers are repeated outside brackets")
    return [_layer(inside, start)] * times


def _layer(text: str, at: int) -> Spec:
    """One layer: parts joined by '+'; `at` is where it begins in what was written."""
    pieces = [(at + start, piece) for start, piece in _pieces(text, "+")]
    parts = tuple(_part(piece, start) for start, piece in pieces)
    for (start, _), part in zip(pieces, parts):
        if len(parts) > 1 and ":" in part.name:
            raise _Wrong(start, "the caller's own is joined to nothing")
    return Spec(parts)


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
