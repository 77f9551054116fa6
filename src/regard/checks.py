"""What arguments may be, said once. Every refusal reads `who: name what is wrong (got ...); expected ...`.

`whole`, `number`, `choice` and `divides` look at numbers and words, `checked` and `fits` at the shapes and dtypes of
tensors, as jaxtyping's annotations give them: letters stand for sizes that must agree wherever they occur, `#T` may be
1, `*b` is any number of axes, `_` and `_name` are free.
"""

import difflib
import functools
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def refuse(
    who: object, name: str, wrong: str, got: object, expected: str, *, error: type[Exception] = ValueError
) -> NoReturn:
    """Raise `error` in the words that all refusals have. `who` is a name, or the module that refuses."""
    raise error(f"{called(who)}: {name} {wrong} (got {short(str(got))}); expected {expected}")


def short(text: str, to: int = 500) -> str:
    """At most so many characters of what was got, with dots where something is missing."""
    return text if len(text) <= to else f"{text[: to - 3]}..."


def called(who: object) -> str:
    """How a module is called in messages: by its mechanism's name, or its class's."""
    return who if isinstance(who, str) else str(getattr(who, "name", None) or type(who).__name__)


def flag(who: object, /, **values: object) -> None:
    """Refuse what is neither True nor False; 0, 1, None and 'no' are neither."""
    for name, value in values.items():
        if not isinstance(value, bool):
            refuse(
                who, name, "has the wrong type", repr(value), f"True or False{_number_within(value)}", error=TypeError
            )


def _number_within(value: object) -> str:
    """The call that gets the number out of an array's or a tensor's single one."""
    alone = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return f", as {'the tensor' if hasattr(value, 'layout') else 'numpy'}'s .item() gives" if alone else ""


def meant(name: str, known: Iterable[str], n: int = 3) -> str:
    """ "did you mean 'name'?" where a name is near enough to be a slip of the finger, else ''."""
    near = difflib.get_close_matches(name, list(known), n=n, cutoff=0.7)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else ""


def whole(who: object, least: int = 1, /, *, most: int | None = None, **values: object) -> None:
    """Refuse what is no int from `least` to `most`; a bool is none. TypeError for what is no int at all."""
    expected = f"an int >= {least}" if most is None else f"an int from {least} to {most}"
    for name, value in values.items():
        if isinstance(value, bool) or not (isinstance(value, int) or type(value).__name__ == "SymInt"):
            words = expected + _number_within(value)
            refuse(who, name, "has the wrong type", repr(value), words, error=TypeError)
        if value < least:  # type: ignore[operator]
            refuse(who, name, "is too small", value, expected)
        if most is not None and value > most:  # type: ignore[operator]
            refuse(who, name, "is too large", value, expected)


def number(
    who: object,
    /,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    **values: object,
) -> None:
    """Refuse what is no finite number > above, >= least, < below, <= most; NaN is none, a bool is none."""
    bounds = ((">", above), (">=", least), ("<", below), ("<=", most))
    expected = "a finite number" + " and".join(f" {sign} {bound:g}" for sign, bound in bounds if bound is not None)
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            words = expected + _number_within(value)
            refuse(who, name, "has the wrong type", repr(value), words, error=TypeError)
        inside = -math.inf < value < math.inf and (above is None or value > above) and (least is None or value >= least)
        if not (inside and (below is None or value < below) and (most is None or value <= most)):
            refuse(who, name, "is out of range", value, expected)


def choice(who: object, known: Iterable[object], /, **values: object) -> None:
    """Refuse what is none of `known`, and name the near ones."""
    known = list(known)
    for name, value in values.items():
        if value not in known:
            hint = meant(str(value), map(str, known), 1)
            listed = f"one of {', '.join(map(repr, known))}"
            refuse(who, name, "is unknown", repr(value), f"{listed}; {hint}" if hint else listed)


def divides(who: object, /, **values: int) -> None:
    """Of two named values the first must divide the second: `divides(self, num_heads=6, dim=24)`."""
    (part, n), (name, whole_) = values.items()
    if n == 0 or whole_ % n:
        refuse(who, name, f"is no multiple of {part} = {n}", whole_, f"a multiple of {part}")


def tokens(who: object, name: str, x: Any, width: int) -> None:
    """Refuse what is not (batch, tokens, width)."""
    fits(who, "B T M", {"M": width}, **{name: x})


def usual(who: object, /, **tensors: Any) -> None:
    """Refuse tensors that no mechanism computes with, and say the call that makes a usual one of each.

    Nested and sparse ones, and numbers of 8 bits: torch's own operators fail on them somewhere inside.
    """
    import torch

    for name, tensor in tensors.items():
        if tensor.is_nested:
            words = f"a padded one, torch.nested.to_padded_tensor({name}, 0.0), and regard.masks.padding(lengths=...)"
            refuse(who, name, "is nested", "a nested tensor", words, error=TypeError)
        if tensor.layout != torch.strided:
            refuse(who, name, "is sparse", tensor.layout, f"a dense tensor, {name}.to_dense()", error=TypeError)
        if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
            words = f"float32, bfloat16, float16 or float64, as {name}.float() gives"
            refuse(who, name, "has the wrong dtype", tensor.dtype, words, error=TypeError)


def foreign(name: str, value: object) -> str:
    """How an array of another library becomes a tensor; '' for what is none."""
    return f"; torch.as_tensor({name}) makes one of it" if hasattr(value, "__array_interface__") else ""


# --- tensors ------------------------------------------------------------------------------------------------

Axis = tuple[str, str]
"""The kind of an axis ("name", "broadcast", "many", "free" or "size") and its letter."""


def _axes(text: str) -> tuple[Axis, ...]:
    import torch

    # Compilers warn of caches, which they can't look into.
    return _parsed(text) if torch.compiler.is_compiling() else _known(text)


def _parsed(text: str) -> tuple[Axis, ...]:
    found: list[Axis] = []
    for word in text.split():
        if word == "...":
            found.append(("many", ""))
        elif word[0] == "*":
            found.append(("many", word[1:]))
        elif word[0] == "#":
            found.append(("broadcast", word[1:]))
        elif word[0] == "_" or not (word.isidentifier() or word.isdigit()):
            found.append(("free", word))
        else:
            found.append(("size" if word.isdigit() else "name", word))
    return tuple(found)


_known = functools.lru_cache(maxsize=512)(_parsed)


def _matches(shape: tuple[int, ...], axes: tuple[Axis, ...], sizes: dict[str, Any]) -> bool:
    """Whether the shape is what `axes` say, given the sizes of letters that are known; learns those that are not."""
    many = [n for n, (kind, _) in enumerate(axes) if kind == "many"]
    if many:
        head, tail = many[0], len(axes) - many[0] - 1
        if len(shape) < head + tail:
            return False
        middle = tuple(shape[head : len(shape) - tail])
        letter = axes[head][1]
        known = sizes.setdefault("*" + letter, middle) if letter and letter[0] != "_" else middle
        if known != middle:
            return False
        shape = (*shape[:head], *shape[len(shape) - tail :])
        axes = (*axes[:head], *axes[head + 1 :])
    if len(shape) != len(axes):
        return False
    for size, (kind, letter) in zip(shape, axes):
        if kind == "free" or (kind == "broadcast" and size == 1):
            continue
        want = int(letter) if kind == "size" else sizes.setdefault(letter, size)
        if size != want:
            return False
    return True


def _wanted(axes: tuple[Axis, ...], sizes: Mapping[str, Any]) -> str:
    """'(B, T, M = 24)'."""
    words = []
    for kind, letter in axes:
        if kind == "many":
            words.append(f"*{letter}" if letter else "...")
        elif kind == "broadcast":
            words.append(f"1 or {letter} = {sizes[letter]}" if letter in sizes else f"1 or {letter}")
        else:
            words.append(f"{letter} = {sizes[letter]}" if letter in sizes else letter)
    return f"({', '.join(words)})"


_DTYPES = {
    "Float": (lambda dtype: dtype.is_floating_point, "floating point"),
    "Bool": (lambda dtype: str(dtype) == "torch.bool", "torch.bool"),
    "Int": (
        lambda dtype: not (dtype.is_floating_point or dtype.is_complex or str(dtype) == "torch.bool"),
        "integers",
    ),
    "Complex": (lambda dtype: dtype.is_complex, "complex"),
}


def fits(who: object, axes: str, sizes: Mapping[str, int] | None = None, /, **tensors: Any) -> dict[str, Any]:
    """Refuse tensors whose axes are not these: `fits(self, "B C Y X", {"C": 8}, x=x)`. Gives the letters' sizes."""
    parsed, known = _axes(axes), dict(sizes or {})
    for name, tensor in tensors.items():
        _look(who, name, tensor, ((parsed, ""),), (), known)
    return known


def _look(
    who: object,
    name: str,
    value: Any,
    forms: tuple[tuple[tuple[Axis, ...], str], ...],
    others: tuple[type, ...],
    sizes: dict[str, Any],
) -> None:
    """Whether `value` is a tensor of one of the forms, or one of the other types; learns its sizes."""
    if hasattr(value, "is_nested"):
        usual(who, **{name: value})  # at first: a nested tensor has no shape to look at
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or not hasattr(dtype, "is_floating_point"):  # arrays of other libraries are none of torch's
        if not isinstance(value, others):
            words = " or ".join(["a Tensor " + _wanted(forms[0][0], sizes), *(kind.__name__ for kind in others)])
            words += foreign(name, value)
            refuse(who, name, "has the wrong type", type(value).__name__, words, error=TypeError)
        return
    for axes, kind in forms:
        if kind and not _DTYPES[kind][0](dtype):
            continue
        learned = dict(sizes)
        if _matches(shape, axes, learned):
            sizes.update(learned)
            return
    kinds = list(dict.fromkeys(kind for _, kind in forms if kind))
    if kinds and not any(_DTYPES[kind][0](dtype) for kind in kinds):
        refuse(who, name, "has the wrong dtype", dtype, " or ".join(_DTYPES[k][1] for k in kinds), error=TypeError)
    refuse(who, name, "has the wrong shape", tuple(shape), " or ".join(_wanted(axes, sizes) for axes, _ in forms))


Plan = tuple[int, str, tuple[tuple[tuple[Axis, ...], str], ...], tuple[type, ...], bool]
"""Of one argument: its place (none for a keyword), name, forms of a tensor, other types, whether None will do."""


def _plan(function: Callable[..., Any]) -> tuple[Plan, ...]:
    """What `checked` looks at: the arguments whose annotations hold jaxtyping's axis strings."""
    found: list[Plan] = []
    for place, parameter in enumerate(inspect.signature(function).parameters.values()):
        annotation = parameter.annotation
        union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
        members = typing.get_args(annotation) if union else (annotation,)
        forms, others, plain = [], [], False
        for member in members:
            text = getattr(member, "dim_str", None)
            if text is not None:
                kind = getattr(getattr(member, "dtype", None), "__name__", "")
                forms.append((_axes(text), kind if kind in _DTYPES else ""))
            elif isinstance(member, type) and member is not type(None):
                plain |= member.__name__ == "Tensor"
                others.append(member)
        if forms and not plain:
            at = sys.maxsize if parameter.kind is parameter.KEYWORD_ONLY else place
            found.append((at, parameter.name, tuple(forms), tuple(others), type(None) in members))
    return tuple(found)


def checked(**letters: str) -> Callable[[F], F]:
    """Look at a function's tensors at every call, as their annotations say, before any work is done.

    No layer takes a map without pixels, of height Y or width X 0.

    Args:
        letters: sizes that are known from the module: `@checked(C="dim")` demands C = self.dim.
    """

    def decorate(function: F) -> F:
        plan, is_method = _plan(function), "self" in inspect.signature(function).parameters
        name = function.__name__
        is_layer = is_method and name in ("forward", "gate")

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            sizes = {letter: getattr(args[0], attribute) for letter, attribute in letters.items()}
            for place, argument, forms, others, optional in plan:
                if place < len(args):
                    value = args[place]
                elif argument in kwargs:
                    value = kwargs[argument]
                else:
                    continue  # its default, or Python's own error
                if value is None and optional:
                    continue
                _look(args[0] if is_method else name, argument, value, forms, others, sizes)
                if is_layer and (sizes.get("Y") == 0 or sizes.get("X") == 0 or 0 in sizes.get("*sizes", ())):
                    refuse(args[0], argument, "has no pixels", tuple(value.shape), "a pixel at least")
            return function(*args, **kwargs)

        return typing.cast(F, wrapper)

    return decorate
