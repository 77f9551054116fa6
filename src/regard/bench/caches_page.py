"""Caches compared, as people read it: tables, a plot for the terminal, and one self-contained page."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from regard import terminal
from regard.bench.caches import FULL, Caches, CachesError, Cell, shown
from regard.bench.process import Stop
from regard.bench.profile_page import amount
from regard.bench.report.head import traceback
from regard.files import write_atomically

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SOME_FAILED = 3
"""Exit code, as that of compare."""

COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9",
    "#7f3c8d", "#666666", "#a05d2c", "#11a579", "#3969ac", "#f2b701",
)  # fmt: skip
MARKS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "star", "pentagon")


def places(cells: Sequence[Cell]) -> list[tuple[str, int]]:
    """Tasks and lengths, in the order asked."""
    return list(dict.fromkeys((cell.task, cell.length) for cell in cells))


def table(cells: Sequence[Cell], config: Caches, task: str, length: int) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: the full cache, then policies; accuracy and share of bytes at each budget, and speed at the
    least."""
    here = {(cell.policy, shown(cell.budget)): cell for cell in cells if (cell.task, cell.length) == (task, length)}
    words = [shown(budget) for budget in config.budget]
    rows = []
    for name in (FULL, *config.policies):
        at = [here.get((name, "" if name == FULL else word)) for word in words]
        if not any(at):
            continue
        first = next(cell for cell in at if cell is not None)
        speeds = [_number(first, "tokens_per_second"), _number(first, "prefill")]
        rows.append([name, *(_number(c, "accuracy") for c in at), *speeds, *(_number(c, "share") for c in at)])
    return ["policy", *words, "tokens/s", "prefill", *(f"bytes {word}" for word in words)], rows


def lines(cells: Sequence[Cell], config: Caches, task: str, length: int) -> list[str]:
    """The table as the terminal has room for it: shares of bytes are left out first."""
    headings, rows = table(cells, config, task, length)
    n = len(config.budget)
    ranks = [0, *range(n), n + 1, n, *range(n + 2, 2 * n + 2)]
    columns = [
        terminal.Column(heading, rank, least=max(12, min(24, terminal.apart([row[0] for row in rows]))))
        if place == 0
        else terminal.Column(heading, rank, right=True)
        for place, (heading, rank) in enumerate(zip(headings, ranks, strict=True))
    ]
    return terminal.joined(terminal.fitted(columns, rows))


def _number(cell: Cell | None, name: str) -> str:
    if cell is None:
        return ""
    if name not in cell.values:
        return "failed" if cell.status == "failed" else "-"
    value = cell.values[name]
    if name == "share":
        return f"{value:.0%}"
    if name == "prefill":
        return amount(value, "s")
    return f"{value:.2f}" if name == "accuracy" else f"{value:.0f}"


def heading(cells: Sequence[Cell], task: str, length: int) -> str:
    """What is asked, and what the full cache does."""
    full = next(c for c in cells if (c.policy, c.task, c.length) == (FULL, task, length))
    said = f"{task} at {length} tokens"
    if "bytes" in full.values:
        said += f"; the full cache has {amount(full.values['bytes'], 'B')} for a question"
    return said


def reasons(cells: Sequence[Cell]) -> list[str]:
    """One line for each thing that went wrong or was left out; what is alike shares one."""
    alike: dict[tuple[str, int, str], list[str]] = {}
    for cell in cells:
        if cell.reason:
            who = " at ".join(filter(None, (cell.policy, shown(cell.budget))))
            alike.setdefault((cell.task, cell.length, cell.reason), []).append(who)
    return [
        f"{task} at {length} tokens: {who[0] if len(who) == 1 else f'{len(who)} cells'}: {reason}"
        for (task, length, reason), who in alike.items()
    ]


def plot(cells: Sequence[Cell], task: str, length: int, width: int = 80, height: int = 18) -> str:
    """Accuracy over the share of bytes in characters; '' where there is nothing to draw, or no extra `report`."""
    here = [c for c in cells if (c.task, c.length) == (task, length) and "share" in c.values]
    if not any(cell.policy != FULL for cell in here):
        return ""
    try:
        import plotext
    except ModuleNotFoundError:
        return ""
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(width, height)
    plotext.ylim(0, 1)
    plotext.xlim(-0.5, 1)  # the legend stands at the left
    plotext.xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    for name, marker in zip(_names(here), "=ox*+#@%&vsdnz" * len(here), strict=False):
        x, y = zip(*_points(here, name), strict=True)
        if name == FULL:
            x, y = (0.0, 1.0), (y[0], y[0])
        plotext.plot(x, y, label=name, marker=marker)
    plotext.title("accuracy by share of the full cache's bytes")
    return str(plotext.uncolorize(plotext.build()))


def _names(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.policy for cell in cells))


def _points(cells: Sequence[Cell], name: str) -> list[tuple[float, float]]:
    return sorted((c.values["share"], c.values["accuracy"]) for c in cells if c.policy == name)


def figure(cells: Sequence[Cell], task: str, length: int) -> "Figure":
    """The same for the page, with standard errors."""
    import plotly.graph_objects as go

    made = go.Figure()
    here = [c for c in cells if (c.task, c.length) == (task, length) and "share" in c.values]
    for n, name in enumerate(name for name in _names(here) if name != FULL):
        mine = sorted((c for c in here if c.policy == name), key=lambda c: c.values["share"])
        colour = COLOURS[n % len(COLOURS)]
        made.add_scatter(
            x=[c.values["share"] for c in mine],
            y=[c.values["accuracy"] for c in mine],
            error_y={"array": [c.values["error"] for c in mine], "thickness": 1, "width": 3},
            text=[f"budget {shown(c.budget)}" for c in mine],
            name=name,
            mode="lines+markers",
            line={"color": colour},
            marker={"symbol": MARKS[n % len(MARKS)], "size": 9},
        )
    for cell in here:
        if cell.policy == FULL:
            made.add_hline(y=cell.values["accuracy"], line_dash="dash", annotation_text="full cache")
    made.update_xaxes(title="share of the full cache's bytes", tickformat=".0%", rangemode="tozero")
    made.update_yaxes(title="accuracy", range=[-0.03, 1.08])
    made.update_layout(height=460, margin={"l": 70, "r": 20, "t": 30, "b": 50}, template="plotly_white")
    return made


def write(cells: Sequence[Cell], config: Caches, path: Path) -> Path:
    """One self-contained page. Raises ModuleNotFoundError, saying what to install, without the extra `report`."""
    try:
        import plotly.io as pio
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("no report.html: it needs plotly; pip install 'regard[report]'") from error
    parts, plotly = [], True
    for task, length in places(cells):
        mine = [c for c in cells if (c.task, c.length) == (task, length)]
        drawn = ""
        if any(c.policy != FULL and c.values for c in mine):
            drawn = pio.to_html(figure(mine, task, length), full_html=False, include_plotlyjs=plotly)
            plotly = False
        parts.append(f"<h2>{escape(f'{task}, {length} tokens')}</h2>{drawn}{_rows(mine)}")
    notes = "".join(f"<li>{escape(reason)}</li>" for reason in reasons(cells))
    notes += "".join(f"<li>{escape(c.policy)}: {traceback(c.traceback)}</li>" for c in cells if c.traceback)
    about = (
        f"{config.model}: {config.samples} questions each, {config.batch} at once, the last {config.held_back} tokens "
        f"of a prompt read after the cache was cut, on {config.device}. Bars are standard errors."
    )
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}"
        "td:first-child,th:first-child{text-align:left}"
    )
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>regard caches</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head><body>'
        f"<h1>Caches that keep less</h1><p>{escape(about)}</p>{''.join(parts)}"
        f"{f'<h2>Missing</h2><ul>{notes}</ul>' if notes else ''}</body></html>"
    )
    write_atomically(path, page)
    return path


def _rows(cells: Sequence[Cell]) -> str:
    """Every cell with all its numbers."""
    parts = sorted({part for cell in cells for part in cell.by_depth}, key=lambda part: int(part.split("-")[0]))
    names = ["policy", "budget", "accuracy", "bytes", "of full", "tokens/s", "prefill", *(f"at {p}" for p in parts)]
    body = []
    for cell in cells:
        held = amount(cell.values["bytes"], "B") if "bytes" in cell.values else ""
        said = [cell.policy, shown(cell.budget), _number(cell, "accuracy"), held]
        said += [_number(cell, name) for name in ("share", "tokens_per_second", "prefill")]
        said += [f"{cell.by_depth[part]:.2f}" if part in cell.by_depth else "" for part in parts]
        body.append("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in said) + "</tr>")
    return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in names)}</tr>{''.join(body)}</table>"


def command(config: Caches) -> int:
    """`regard caches`: ask with a progress bar, print tables and plots, write the report.

    Gives 3 if some cells failed, 130 or 143 if stopped.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from regard.bench.caches import KEPT, run

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    stop = Stop()
    screen = terminal.console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        count = len(config.tasks) * len(config.lengths) * (1 + len(config.budget) * len(config.policies))
        shows = bar.add_task("asking", total=count)

        def seen(cell: Cell) -> None:
            words = " ".join(filter(None, (cell.policy, shown(cell.budget), "of", cell.task, str(cell.length))))
            bar.update(shows, advance=1, description=terminal.line(words))

        cells = run(config, on_cell=seen, stop=stop)
    if not cells:
        raise CachesError("caches: stopped before the first cell was asked")
    for task, length in places(cells):
        mine = [c for c in cells if (c.task, c.length) == (task, length)]
        print("\n".join(terminal.wrapped(heading(mine, task, length))))
        if any(c.values for c in mine):
            print("\n".join(lines(mine, config, task, length)))
        print()
        if drawn := plot(mine, task, length, width=min(96, terminal.width())):
            print(drawn)
    for reason in reasons(cells):
        terminal.show(terminal.indented(f"- {reason}"))
    try:
        said: object = f"report: {write(cells, config, config.out / 'report.html')}"
    except ModuleNotFoundError as error:
        said = error
    print("\n".join(terminal.wrapped(terminal.line(said))))
    if stop.number:
        return 128 + stop.number
    if not any(cell.values for cell in cells):
        raise CachesError(f"{config.out / KEPT}: no cell could be asked; it says why not, of each")
    return SOME_FAILED if any(cell.status == "failed" for cell in cells) else 0
