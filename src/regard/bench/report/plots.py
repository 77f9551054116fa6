"""What all plots share: a look a mechanism, the key, axes, and the figure around a plot.

A plot is a dictionary that templates/report.js draws; `figure` adds it to the page's list of plots.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from regard.bench.report.groups import Row
from regard.bench.report.text import clean, text

DASHES = {
    "solid": "",
    "dash": "7 4",
    "dot": "2 3",
    "dashdot": "7 3 2 3",
    "longdash": "11 4",
    "longdashdot": "11 3 2 3",
}
"""plotly's dash names, and the same dashes as SVG stroke patterns."""
MARKERS = {
    "circle": "M15 1.5a4.5 4.5 0 1 0 .01 0z",
    "square": "M11 2h8v8h-8z",
    "diamond": "M15 .5l5.5 5.5-5.5 5.5-5.5-5.5z",
    "triangle-up": "M15 1l5 9h-10z",
    "x": "M11 0l4 4 4-4 2 2-4 4 4 4-2 2-4-4-4 4-2-2 4-4-4-4z",
    "cross": "M13.4 1h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z",
    "triangle-down": "M15 11l5-9h-10z",
    "star": "M15 0l1.6 4.2 4.4.2-3.4 2.8 1.2 4.4-3.8-2.5-3.8 2.5 1.2-4.4-3.4-2.8 4.4-.2z",
    "pentagon": "M15 1l5 3.7-1.9 5.8h-6.2l-1.9-5.8z",
    "hexagram": "M15 0l2 3h3.5l-1.8 3 1.8 3h-3.5l-2 3-2-3h-3.5l1.8-3-1.8-3h3.5z",
}
"""plotly's marker names, and the same shapes as SVG paths around (15, 6), for the key."""
COLOURS = 8
"""The style sheet names --c0 to --c7. Dash and marker cycle at other lengths, so that 120 looks differ."""


def look(row: Row) -> dict[str, Any]:
    """The part of a series that is the mechanism's in every plot."""
    return {
        "mechanism": row.index,
        "name": clean(row.label, 80),
        "colour": row.index % COLOURS,
        "dash": tuple(DASHES)[row.index % len(DASHES)],
        "marker": tuple(MARKERS)[row.index % len(MARKERS)],
    }


def key(rows: Sequence[Row]) -> str:
    """The legend, as buttons that hide and show a mechanism in every plot."""
    items = ""
    for row in rows:
        its = look(row)
        ink = f"var(--c{its['colour']})"
        items += (
            f'<li><button type="button" aria-pressed="true" data-mechanism="{row.index}">'
            '<svg width="30" height="12" aria-hidden="true">'
            f'<path d="M1 6h28" stroke-width="2" stroke="{ink}" stroke-dasharray="{DASHES[its["dash"]]}"/>'
            f'<path d="{MARKERS[its["marker"]]}" fill="{ink}"/></svg>{text(row.label, 80)}</button></li>'
        )
    return f'<ul class="key" aria-label="Key; press to hide or show a mechanism">{items}</ul>'


def figure(plot: dict[str, Any], heading: str, caption: str, plots: list[dict[str, Any]]) -> str:
    """The place on the page where report.js draws `plot`."""
    plots.append(plot)
    note = ""
    if plot.get("labels"):
        note = (
            f'<p class="note" id="{plot["id"]}-unlabelled" hidden>Points without a label had no room: '
            "tap or hover to read it, or see the table.</p>"
        )
    top = f"<h3>{heading}</h3>" if heading else ""
    without = "<noscript>The plot needs JavaScript; the table above holds its numbers.</noscript>"
    drawn = f'<div class="plot" id="{plot["id"]}" role="img" aria-label="{caption}">{without}</div>'
    return f"<figure>{top}{drawn}<figcaption>{caption}</figcaption>{note}</figure>"


def axis(title: str, values: Iterable[float], pad: float, log: bool = False, percent: bool = False) -> dict[str, Any]:
    """An axis around `values` with free space on both sides; its range is in log10 units if `log`.

    A log axis leaves out what is not above zero, such as the lower end of a wide spread.
    """
    found = [math.log10(v) if log else v for v in values if v > 0 or not log]
    low, high = min(found), max(found)
    room = max(pad * (high - low), 0.01 * abs(high)) or 1.0
    made = {"title": title, "type": "log" if log else "linear", "range": [low - room, high + room]}
    return made | ({"tickformat": ".0%"} if percent else {})


def spans(losses: Sequence[float]) -> bool:
    """Whether losses differ so much that only a log axis shows them all."""
    return min(losses) > 0 and max(losses) > 3 * min(losses)


def digits(values: Iterable[float]) -> list[float | None]:
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values]
