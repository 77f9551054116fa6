"""Commands whose options are the fields of a config dataclass: names, types, defaults and help are said there alone."""

import ast
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.arguments import integers
from regard.cli.group import Command, app


@dataclass(frozen=True)
class Source:
    """A config dataclass, and what its annotations and docstrings do not say of it on a command line."""

    config: type
    read: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)
    """Field -> how its text is read, where the type does not say that."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Field -> '--on/--off', where that is not '--field/--no-field'."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Field -> what stands for a default of None."""
    words: Mapping[str, str] = field(default_factory=dict)
    """Field -> what its help says besides."""
    arguments: frozenset[str] = frozenset()
    """Fields that stand without a name, and must be given."""


def configured(source: Callable[[], Source]) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function of a config as the command of its name.

    `source` is called when options are asked for, so that `regard --help` imports no config.
    """

    def register(run: Callable[[Any], None]) -> Callable[[Any], None]:
        class Configured(Command):
            def get_params(self, ctx: Any) -> list[Any]:
                if not self.params:
                    made = typer.main.get_command(_alone(_taking(source(), run)))
                    self.params, self.callback = made.params, made.callback
                return super().get_params(ctx)

        def waiting() -> None:
            pass

        app.command(run.__name__, cls=Configured, help=inspect.getdoc(run))(waiting)
        return run

    return register


def _alone(function: Callable[..., None]) -> typer.Typer:
    one = typer.Typer(add_completion=False)
    one.command()(function)
    return one


def _taking(source: Source, run: Callable[[Any], None]) -> Callable[..., None]:
    """A function that typer can take for a command: its arguments are the fields, and it runs `run` on a config."""
    hints, words = typing.get_type_hints(source.config), documented(source.config)
    readers: dict[str, Callable[[Any], Any]] = {}
    parameters = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for one in filter(lambda one: one.init, fields(source.config)):
        kind, read, note = _option(one.name, hints[one.name], source)
        readers[one.name] = read
        text = " ".join(filter(None, (words.get(one.name, ""), note, source.words.get(one.name, ""))))
        start = None if one.default is MISSING else one.default
        start = start if one.default_factory is MISSING else one.default_factory()
        if one.name in source.arguments:
            said = Annotated[kind, typer.Argument(help=text, metavar=one.name.upper())]  # type: ignore[valid-type]
            parameters.append(inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, annotation=said))
            continue
        option = typer.Option(
            source.flags.get(one.name) or _flag(one.name, kind),
            help=text,
            metavar="PATH" if kind == list[Path] else None,
            show_default=source.defaults.get(one.name, True) if start is None else True,
        )
        default = _shown(start, kind)
        parameters.append(
            inspect.Parameter(
                one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind | None, option]
            )
        )

    def command(ctx: typer.Context, **values: Any) -> None:
        given = {name: value for name, value in values.items() if _given(ctx, name)}
        run(source.config(**{name: readers[name](value) for name, value in given.items()}))

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _given(ctx: typer.Context, name: str) -> bool:
    """Whether the caller said it; what nobody said is left to the config."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _flag(name: str, kind: object) -> str:
    option = "--" + name.replace("_", "-")
    return f"{option}/--no-{option[2:]}" if kind is bool else option


def _shown(value: Any, kind: object) -> Any:
    """A field's default as the option has it."""
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or None
    return kind(value) if inspect.isclass(kind) and issubclass(kind, StrEnum) and value is not None else value


def _option(name: str, hint: Any, source: Source) -> tuple[Any, Callable[[Any], Any], str]:
    """Of a field: the type of its option, how what was given becomes the field's value, and a note for the help."""
    members = [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
    origin, inner = typing.get_origin(members[0]), typing.get_args(members[0])
    if name in source.read:
        return str, source.read[name], ""
    if origin is typing.Literal:
        return StrEnum(name, {str(value): value for value in inner}), lambda value: value.value, ""
    if Path in members:
        return Path, Path, ""
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        make = tuple if origin is tuple else list
        if Path in (*inner, *(member for one in inner for member in typing.get_args(one))):
            return list[Path], make, "May be repeated."
        read = (lambda text: integers(name, text)) if int in inner else _names
        return str, lambda text: make(read(text)), "With commas between."
    return members[0], lambda value: value, ""


def _names(text: str) -> list[str]:
    from regard.spec import split

    return split(text)


def documented(config: type) -> dict[str, str]:
    """Field -> the first paragraph of the docstring below it."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0].body  # type: ignore[attr-defined]
    except OSError:  # installed without its source
        return {}
    found = {}
    for above, below in pairwise(body):
        match above, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
    return found
