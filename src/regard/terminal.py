"""What the command line prints with: a console that keeps to the terminal, and text that is safe to show."""

import codecs
import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
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


def width() -> int:
    """Columns of the terminal; COLUMNS is heeded."""
    return max(shutil.get_terminal_size().columns, LEAST)


def wrapped(text: str, by: int = 0, hang: int = 0) -> list[str]:
    """Lines no wider than the terminal, indented by so many blanks, those after the first by `hang` more.

    Blanks that the text begins with are indentation too. A no-break space holds words together.
    """
    inner = clean(text).lstrip(" ")
    start = " " * (by + len(text) - len(text.lstrip(" ")))
    lines = textwrap.wrap(
        inner, width(), initial_indent=start, subsequent_indent=start + " " * hang, break_on_hyphens=False
    )
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines] or [""]


def columns(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose last column wraps, or stands on lines of its own where it would be too narrow.

    It does without rich, which takes longer to import than a list takes to read.
    """
    every = [tuple(map(line, row)) for row in (heading, *rows)]
    widths = [max(map(len, column)) + 2 for column in list(zip(*every))[:-1]]
    left, lines = sum(widths), []
    beside = width() - left >= NARROW
    for *cells, last in every:
        start = "".join(f"{cell:{n}}" for cell, n in zip(cells, widths))
        first, *rest = wrapped(last, left if beside else 4)
        lines += [start + first[left:], *rest] if beside else [start, first, *rest]
    return [text.rstrip() for text in lines]


NARROW = 26
"""Columns in which text cannot be read."""


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


def indented(text: str, by: int = 2, hang: int | None = None) -> str:
    """Text that wraps within its indentation; lines after the first go in by `hang` more.

    By default that is 2 in list items, and in lines that are indented already.
    """
    return "\n".join(wrapped(text, by, hang if hang is not None else 2 * text.startswith(("- ", " "))))


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
