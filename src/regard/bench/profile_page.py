"""A profile as people read it: a table, a plot for the terminal, and one self-contained page."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from regard import terminal
from regard.bench.process import Stop
from regard.bench.profile import QUANTITIES, Measured, Profile, formula_growth, growth
from regard.bench.report.head import traceback
from regard.files import write_atomically
from regard.models.mixer import parse

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SHOWN = {
    "forward": "forward",
    "training": "forward + backward",
    "step": "one token",
    "forward_bytes": "memory, forward",
    "training_bytes": "memory, training",
    "state_bytes": "state",
}


def amount(value: float, unit: str) -> str:
    """0.0123, "s" -> '12.3 ms'."""
    steps = ((1, "s"), (1e-3, "ms"), (1e-6, "us")) if unit == "s" else ((2**30, "GB"), (2**20, "MB"), (2**10, "KB"))
    size, word = next(((s, w) for s, w in steps if value >= s), steps[-1])
    return f"{value / size:.3g} {word}"


def names(cells: Sequence[Measured]) -> list[str]:
    return list(dict.fromkeys(cell.mechanism for cell in cells))


def table(cells: Sequence[Measured], config: Profile, quantity: str) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: mechanisms down, lengths across; last the measured growth exponent and the formula's."""
    lengths = sorted({cell.length for cell in cells})
    rows = []
    for name in names(cells):
        at = {cell.length: cell for cell in cells if cell.mechanism == name}
        row = [_cell(at.get(n), quantity) for n in lengths]
        measured = growth(cells, name, quantity)
        said = _formula(name, config) if quantity == "forward" else None
        rows.append([name, *row, *("" if e is None else f"T^{e:.2f}" for e in (measured, said))])
    return [SHOWN[quantity], *(_length(n) for n in lengths), "growth", "formula"], rows


def lines(cells: Sequence[Measured], config: Profile, quantity: str) -> list[str]:
    """The table as the terminal has room for it: the greatest lengths first, then growth, then the formula."""
    (what, *lengths, grows, formula), rows = table(cells, config, quantity)
    columns = [
        terminal.Column(what, least=max(16, min(40, terminal.apart([row[0] for row in rows])))),
        *(terminal.Column(n, rank=len(lengths) - place, right=True) for place, n in enumerate(lengths)),
        terminal.Column(grows, rank=1, right=True),
        terminal.Column(formula, rank=2 + len(lengths) // 2, right=True),
    ]
    return terminal.joined(terminal.fitted(columns, rows))


def _length(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def _cell(cell: Measured | None, quantity: str) -> str:
    if cell is None:
        return ""
    if quantity in cell.values:
        return amount(cell.values[quantity], QUANTITIES[quantity])
    return "too long" if "too long" in cell.reason or "limit" in cell.reason else "-"


def _formula(name: str, config: Profile) -> float | None:
    from regard import catalog

    spec = parse(name)
    if spec.own or len(spec.parts) > 1:
        return None
    return formula_growth(catalog.card(spec.name), spec.parts[0].options, config)


def reasons(cells: Sequence[Measured]) -> list[str]:
    """One line for each thing that went wrong or is missing."""
    return list(dict.fromkeys(reason_of(cell) for cell in cells if cell.reason))


def reason_of(cell: Measured) -> str:
    return f"{cell.mechanism} at {cell.length}: {cell.reason}"


def plot(cells: Sequence[Measured], quantity: str = "forward", width: int = 96, height: int = 18) -> str:
    """A log-log plot in characters; '' where there is nothing to draw, and without the extra `report`."""
    cells = [cell for cell in cells if 0 < cell.values.get(quantity, 0) < math.inf]
    if not cells:
        return ""
    try:
        import plotext
    except ModuleNotFoundError:
        return ""
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(width, height)
    plotext.xscale("log")
    plotext.yscale("log")
    lengths = sorted({cell.length for cell in cells})
    plotext.xticks(lengths, [_length(n) for n in lengths])
    for name, marker in zip(names(cells), "ox*+#@%&" * len(cells), strict=False):
        points = [(c.length, c.values[quantity]) for c in cells if c.mechanism == name]
        plotext.plot(*zip(*points, strict=True), label=name, marker=marker)
    plotext.title(f"{SHOWN[quantity]} ({QUANTITIES[quantity]}) by tokens")
    return str(plotext.uncolorize(plotext.build()))


def figure(cells: Sequence[Measured], quantity: str) -> "Figure":
    """The same for the page."""
    import plotly.graph_objects as go

    made = go.Figure()
    for name in names(cells):
        points = [(c.length, c.values[quantity]) for c in cells if c.mechanism == name and quantity in c.values]
        if points:
            x, y = zip(*points, strict=True)
            exponent = growth(cells, name, quantity)
            label = name if exponent is None else f"{name}  T^{exponent:.2f}"
            made.add_scatter(x=x, y=y, name=label, mode="lines+markers")
    made.update_xaxes(type="log", title="tokens", tickvals=sorted({c.length for c in cells}))
    made.update_yaxes(type="log", title=f"{SHOWN[quantity]} ({QUANTITIES[quantity]})")
    made.update_layout(height=420, margin={"l": 70, "r": 20, "t": 30, "b": 50}, template="plotly_white")
    return made


def write(cells: Sequence[Measured], config: Profile, path: Path) -> Path:
    """One self-contained page. Raises ModuleNotFoundError, saying what to install, without the extra `report`."""
    try:
        import plotly.io as pio
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("no report.html: it needs plotly; pip install 'regard[report]'") from error
    from html import escape

    parts, plotly = [], True
    for quantity, words in SHOWN.items():
        if not any(quantity in cell.values for cell in cells):
            continue
        drawn = pio.to_html(figure(cells, quantity), full_html=False, include_plotlyjs=plotly)
        plotly = False
        parts.append(f"<h2>{words}</h2>{drawn}{_rows(cells, config, quantity)}")
    traces = {reason_of(cell): traceback(cell.traceback) for cell in cells}
    notes = "".join(f"<li>{escape(reason)}{traces[reason]}</li>" for reason in reasons(cells))
    about = (
        f"dim {config.dim}, {config.heads} heads, batch {config.batch}, "
        f"{'causal' if config.causal else 'bidirectional'}, on {config.device}"
    )
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}"
        "td:first-child,th:first-child{text-align:left}"
    )
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>regard profile</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head><body>'
        f"<h1>Time and memory by length</h1><p>{escape(about)}</p>{''.join(parts)}"
        f"{f'<h2>Missing</h2><ul>{notes}</ul>' if notes else ''}</body></html>"
    )
    write_atomically(path, page)
    return path


def _rows(cells: Sequence[Measured], config: Profile, quantity: str) -> str:
    from html import escape

    headings, rows = table(cells, config, quantity)
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def command(config: Profile) -> int:
    """`regard profile`: measure with a progress bar, print tables and a plot, write the report. 130 if stopped."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from regard.bench.profile import ProfileError, run

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    stop = Stop()
    screen = terminal.console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        count = len(config.mechanisms) * len(config.lengths)
        task = bar.add_task("measuring", total=count)

        def seen(cell: Measured) -> None:
            bar.update(task, advance=1, description=terminal.line(f"{cell.mechanism} at {_length(cell.length)}"))

        cells = run(config, on_cell=seen, stop=stop)
    if not cells:
        raise ProfileError("profile: stopped before the first cell was measured")
    for quantity in SHOWN:
        if any(quantity in cell.values for cell in cells):
            print("\n".join([*lines(cells, config, quantity), ""]))
    if drawn := plot(cells, width=min(96, terminal.width())):
        print(drawn)
    for reason in reasons(cells):
        terminal.show(terminal.indented(f"- {reason}"))
    try:
        said: object = f"report: {write(cells, config, config.out / 'report.html')}"
    except ModuleNotFoundError as error:
        said = error
    print("\n".join(terminal.wrapped(terminal.line(said))))
    if not stop.number and not any(cell.values for cell in cells):
        raise ProfileError(f"{config.out / 'profile.json'}: no cell could be measured; it says why not, of each")
    return 128 + stop.number if stop.number else 0
