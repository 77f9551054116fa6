"""Values as the page shows them: cleaned, escaped, rounded, and joined into sentences."""

import html
import re
from collections.abc import Sequence

DASH = "—"
"""What stands where nothing was measured."""

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def clean(value: object, limit: int = 400) -> str:
    """Text without control and direction-changing characters, at most `limit` long."""
    shown = str(value)
    shown = shown if len(shown) <= limit else shown[: limit - 1] + "…"
    return _UNSAFE.sub("\ufffd", shown)


def text(value: object, limit: int = 400) -> str:
    """Text for markup and for quoted attributes."""
    return html.escape(clean(value, limit), quote=True)


def quantity(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: '51.7 k tok/s', '65.5 KB', '1.20 M'. Small counts in full."""
    if not unit and value < 10_000 and value == int(value):
        return f"{value:.0f}"
    prefixes = ("B", "KB", "MB", "GB", "TB") if unit == "B" else ("", "k", "M", "G", "T", "P")
    step = 0
    while step < len(prefixes) - 1 and value >= 999.5:
        value, step = value / 1000, step + 1
    decimals = 0 if value >= 99.95 or (step == 0 and value == int(value)) else 1 if value >= 9.995 else 2
    return " ".join(filter(None, (f"{value:.{decimals}f}", prefixes[step], unit if unit != "B" else "")))


def listing(names: Sequence[str], limit: int = 8) -> str:
    """'a', 'a and b', 'a, b and 7 more'."""
    shown = list(names) if len(names) <= limit else [*names[: limit - 1], f"{len(names) - limit + 1} more"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
