"""The report of a comparison: one HTML file that holds its plots, its numbers and how to repeat it.

Everything that comes from outside (names, reasons, paths, settings) is text: `text.text` cleans and escapes
it for markup and attributes, and the plots receive it as JSON. The page loads nothing from anywhere.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from regard.bench.record import Result
from regard.bench.report.page import render
from regard.files import write_atomically


def write(results: Sequence[Result], path: str | os.PathLike[str], *, title: str = "regard compare") -> Path:
    """Write `results` as one self-contained page to `path`, whole or not at all, and return the path."""
    if not results:
        raise ValueError("results: is empty; expected at least one Result")
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        raise ModuleNotFoundError('report.html needs plotly: pip install "regard[report]"') from None
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, render(results, title, get_plotlyjs()).encode())
    return target
