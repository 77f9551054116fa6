"""What all commands hang on: the app, its version, and how the caller's mistakes end."""

import os
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from regard import terminal

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""What the parser raises; typer brings it from click, or has it of its own, and names only its heir."""

MISTAKE = 2
"""Exit code for what the caller can put right."""


class Option(TyperOption):
    """Text, and what nobody gave, needs no check: typer's loads pydantic, which takes longer than all of a list."""

    def process_value(self, ctx: Any, value: Any) -> Any:
        kind = getattr(getattr(self, "type_descriptor", None), "annotation", None)
        if (value is None and not (self.required or self.multiple)) or (kind is str and isinstance(value, str)):
            return value if self.callback is None else self.callback(ctx, self, value)
        return super().process_value(ctx, value)


def unchecked(params: list[Any]) -> list[Any]:
    """These parameters, the options among them as such."""
    for param in params:
        if type(param) is TyperOption:
            param.__class__ = Option
    return params


class Command(TyperCommand):
    """A command with such options."""

    def get_params(self, ctx: Any) -> list[Any]:
        return unchecked(super().get_params(ctx))


class Commands(TyperGroup):
    """Mistakes of the caller end in one line on stderr; REGARD_TRACEBACK=1 shows where they came from."""

    def get_params(self, ctx: Any) -> list[Any]:
        return unchecked(super().get_params(ctx))

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().make_context(*args, **kwargs)
        except UsageError as error:
            _misused(error)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader has left; typer ends quietly
        except UsageError as error:
            _misused(error)
        except (ValueError, TypeError, OSError, ImportError) as error:
            if os.environ.get("REGARD_TRACEBACK", "") not in ("", "0"):
                raise
            terminal.error(_reason(error))
            raise typer.Exit(MISTAKE) from None


def _misused(error: Any) -> NoReturn:
    """One line for what the command line has not; help for whoever said nothing at all."""
    if type(error).__name__ == "NoArgsIsHelpError":
        raise error
    where = f"; {error.ctx.command_path} --help tells more" if error.ctx is not None else ""
    terminal.error(f"{error.format_message().rstrip('.')}{where}")
    raise typer.Exit(MISTAKE) from None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help is there in half the time, and wraps better in narrow terminals
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Every attention mechanism worth knowing: list and compare them, and see what runs and why.",
)


def _version(asked: bool) -> None:
    if asked:
        from regard import __version__

        print(f"regard {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point of `regard`."""
    terminal.tolerate_encoding()
    app(prog_name="regard")
