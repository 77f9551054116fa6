"""What the command line prints with: a console that keeps to the terminal, and text that is safe to show."""

import codecs
import re
import sys
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_UNSAFE = re.compile(
    "\x1b\\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
"""Terminal sequences, control characters but tab and newline, turns of reading direction, half surrogates."""

_PLAIN = {
    **dict(zip("▁▂▃▄▅▆▇█", "_.-=+*%#")),
    **dict(zip("·░▒▓", ".:+%")),
    **dict(zip("–—−’‘“”×⋅²³", "---''\"\"x*23")),
    **{
        "…": "...",
        "→": "->",
        "≤": "<=",
        "≥": ">=",
        "≈": "~",
        "±": "+-",
        "√": "sqrt",
        "α": "alpha",
        "∞": "inf",
    },
}
"""How pictures and signs read on a terminal that cannot show them."""


LEAST = 40
"""Columns. In fewer, tables would lose their text."""


def clean(value: object) -> str:
    """Text without control characters, so that a name or a path cannot steer the terminal."""
    return _UNSAFE.sub("", str(value))


def line(value: object) -> str:
    """Clean text on one line."""
    return " ".join(clean(value).split())


def console(*, stderr: bool = False) -> "Console":
    """A console of rich that takes text as it is. NO_COLOR and COLUMNS are heeded."""
    from rich.console import Console

    made = Console(file=sys.stderr if stderr else sys.stdout, markup=False, highlight=False, emoji=False)
    made.width = max(made.width, LEAST)
    return made


def show(*parts: "RenderableType", style: str | None = None, cut: bool = False) -> None:
    """Print to stdout, without blanks at the ends of lines; long lines are wrapped, or cut."""
    to = console()
    with to.capture() as captured:
        for part in parts:
            to.print(part, style=style, no_wrap=cut, overflow="crop" if cut else None)
    print("\n".join(text.rstrip() for text in captured.get().split("\n")), end="")


def indented(text: str, by: int = 2) -> "RenderableType":
    """Text that wraps within its indentation; a list item hangs under its own first word."""
    from rich.padding import Padding
    from rich.text import Text

    if text.startswith("- "):
        from rich.table import Table

        item = Table.grid()
        item.add_row(" " * by + "- ", Text(clean(text[2:])))
        return item
    return Padding(Text(clean(text)), (0, 0, 0, by))


def grid(*columns: str | int) -> "Table":
    """A table without lines. A column is a heading, or the least width of one without. The last wraps."""
    from rich.table import Table

    made = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        show_header=isinstance(columns[0], str),
        header_style="bold",
    )
    for n, column in enumerate(columns):
        heading, width = (column, None) if isinstance(column, str) else ("", column)
        made.add_column(heading, min_width=width, no_wrap=n < len(columns) - 1, overflow="fold")
    return made


def error(value: object) -> None:
    """One line on stderr."""
    print(f"error: {line(value)}", file=sys.stderr)


def tolerate_encoding() -> None:
    """Print a likeness of what the terminal's encoding lacks, instead of failing."""
    codecs.register_error("regard", _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="regard")


def _plain(problem: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(problem, UnicodeEncodeError):
        raise problem
    missing = problem.object[problem.start : problem.end]
    return "".join(_PLAIN.get(c) or _unaccented(c) for c in missing), problem.end


def _unaccented(character: str) -> str:
    base = unicodedata.normalize("NFKD", character)[0]
    return base if base.isascii() else "?"
