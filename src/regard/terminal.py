"""What the command line prints with: a console that keeps to the terminal, and text that is safe to show."""

import codecs
import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

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


def wrapped(text: str, by: int = 0, hang: int = 0, within: int | None = None) -> list[str]:
    """Lines no wider than the terminal, indented by so many blanks, those after the first by `hang` more.

    Blanks that the text begins with are indentation too. A no-break space holds words together.
    """
    inner = clean(text).lstrip(" ")
    start = " " * (by + len(text) - len(text.lstrip(" ")))
    lines = textwrap.wrap(
        inner,
        width() if within is None else within,
        initial_indent=start,
        subsequent_indent=start + " " * hang,
        break_on_hyphens=False,
    )
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines] or [""]


@dataclass(frozen=True)
class Column:
    """A column of a table, and what becomes of it where there is no room for all."""

    heading: str
    rank: int = 0
    """Those of higher rank are left out first; those of rank 0 stay."""
    least: int | None = None
    """Columns of the terminal to which its text may be cut; None: it is shown whole or not at all."""
    right: bool = False
    """Whether it stands at the right, as numbers do."""


def fitted(columns: Sequence[Column], rows: Sequence[Sequence[str]], within: int | None = None) -> list[list[str]]:
    """Cells of a table that fits the terminal with a line a row, the headings first; join them with two blanks.

    Text is cut as far as its column allows, then columns are left out by rank. The last line, of one cell, names these.
    It does without rich, which takes longer to import than a list takes to read.
    """
    within = width() if within is None else within
    texts = [[line(cell) for cell in row] for row in ([column.heading for column in columns], *rows)]
    widths = [max(map(len, cells)) for cells in zip(*texts)]
    kept, missing = list(range(len(columns))), []
    while True:
        over = sum(widths[n] for n in kept) + 2 * (len(kept) - 1) - within
        spare = sum(max(0, widths[n] - least) for n in kept if (least := columns[n].least) is not None)
        last = max(kept, key=lambda n: (columns[n].rank, n))
        if over <= spare or columns[last].rank == 0:
            break
        kept.remove(last)
        missing.append(last)
    for n in sorted(kept, key=lambda n: -widths[n]):
        if (least := columns[n].least) is not None and over > 0:
            taken = min(over, max(0, widths[n] - least))
            widths[n], over = widths[n] - taken, over - taken
    made = [[_padded(row[n], widths[n], columns[n].right) for n in kept] for row in texts]
    if missing:
        named = ", ".join(columns[n].heading for n in sorted(missing))
        made.append([f"no room for {named}"])
    return made


def joined(cells: Sequence[Sequence[str]]) -> list[str]:
    """The lines of `fitted`; its last is wrapped where it must be."""
    return [text for row in cells for text in ([(" " * 2).join(row).rstrip()] if len(row) > 1 else wrapped(row[0]))]


def cut(text: str, to: int) -> str:
    """At most so many characters of the text, with a sign where something is missing."""
    return text if len(text) <= to else text[: max(0, to - 1)].rstrip() + "…"


def apart(texts: Sequence[str]) -> int:
    """To how many characters texts may be cut and still be told from each other."""
    different = set(texts)
    longest = max(map(len, different), default=0)
    return next((to for to in range(longest) if len({cut(text, to) for text in different}) == len(different)), longest)


def _padded(text: str, to: int, right: bool) -> str:
    text = cut(text, to)
    return text.rjust(to) if right else text.ljust(to)


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
