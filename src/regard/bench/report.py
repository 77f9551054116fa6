"""The report of a comparison: one HTML file that holds its plots, its numbers and how to repeat it.

Everything that comes from outside (names, reasons, paths, settings) is text: `_text` cleans and escapes it
for markup and attributes, and the plots receive it as JSON. The page loads nothing from anywhere.
"""

import html
import json
import math
import os
import re
import secrets
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from regard.bench.record import Result

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
CURVE_POINTS = 60
"""At most so many points a curve; longer ones are averaged over stretches of steps."""
DASH = "—"


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
    _replace(target, _page(results, title, get_plotlyjs()).encode())
    return target


def _replace(target: Path, content: bytes) -> None:
    """Readers see the old file or the new one, never a part: written beside it, then renamed over it."""
    beside = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


# --- Numbers


@dataclass(frozen=True)
class Stat:
    """A mean over seeds with its sample standard deviation (None with fewer than two seeds)."""

    mean: float
    spread: float | None
    count: int

    @property
    def finite(self) -> bool:
        return math.isfinite(self.mean)


def _stat(values: Iterable[float]) -> Stat | None:
    found = [float(v) for v in values]
    if not found:
        return None
    if not all(map(math.isfinite, found)):
        return Stat(math.nan, None, len(found))
    return Stat(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


MEASURES: dict[str, tuple[str, str, int]] = {
    "train_tokens_per_second": ("Train", "tok/s", 1),
    "generate_tokens_per_second": ("Generate", "tok/s", 1),
    "peak_memory_bytes": ("Peak memory", "B", -1),
    "state_bytes": ("State", "B", -1),
    "parameters": ("Parameters", "", 0),
    "mlp_dim": ("MLP width", "", 0),
    "flops_per_token": ("FLOP per token", "", -1),
}
"""Column of the table -> heading, unit, whether more is better (1), less (-1) or neither."""


@dataclass
class Row:
    """All seeds of one mechanism under one set of settings."""

    label: str
    mechanism: str
    done: list[Result]
    failed: list[Result]
    index: int = 0
    """Its place in the whole report, which decides its colour, dash and marker."""
    loss: dict[str, Stat] = field(default_factory=dict)
    measures: dict[str, Stat] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for length in {length for r in self.done for length in r.heldout}:
            stat = _stat(r.heldout[length] for r in self.done if length in r.heldout)
            if stat is not None:
                self.loss[length] = stat
        for name in MEASURES:
            stat = _stat(value for r in self.done if (value := getattr(r, name)) > 0)
            if stat is not None and stat.finite:
                self.measures[name] = stat

    def curve(self) -> list[tuple[int, float]]:
        """The mean training loss at the steps that every seed recorded."""
        curves = [dict(r.curve) for r in self.done if r.curve]
        steps = sorted(set.intersection(*(set(c) for c in curves))) if curves else []
        return [(step, statistics.fmean(c[step] for c in curves)) for step in steps]


@dataclass
class Group:
    """The rows of one task, best first; those without a finite loss come last."""

    task: str
    rows: list[Row]
    lengths: list[str]
    main: str
    """The length that ranks: the training length wherever it was measured."""

    @property
    def ranked(self) -> list[Row]:
        return [r for r in self.rows if self.main in r.loss and r.loss[self.main].finite]


def _factor(length: str) -> tuple[float, str]:
    try:
        return float(length.removesuffix("x")), length
    except ValueError:
        return math.inf, length


def _groups(results: Sequence[Result]) -> list[Group]:
    """A group a task; in it a row a mechanism and settings, as a mean must not mix settings."""
    latest = {r.cell.key: r for r in results}.values()
    groups, index = [], 0
    for task in dict.fromkeys(r.cell.task for r in latest):
        variants: dict[tuple[str, str], list[Result]] = {}
        for r in latest:
            if r.cell.task == task:
                same = (r.cell.mechanism, json.dumps(r.cell.settings, sort_keys=True))
                variants.setdefault(same, []).append(r)
        rows = []
        for (mechanism, _), members in variants.items():
            # Where a mechanism ran under several settings, its label says what differs.
            differing = _differing(
                [m[0].cell.settings for (name, _), m in variants.items() if name == mechanism]
            )
            settings = members[0].cell.settings
            label = " · ".join([mechanism, *(f"{key}={_value(settings.get(key))}" for key in differing)])
            done = [r for r in members if r.status == "done"]
            rows.append(Row(label, mechanism, done, [r for r in members if r.status != "done"]))
        lengths = sorted({length for row in rows for length in row.loss}, key=_factor)
        main = lengths[0] if lengths and "1x" not in lengths else "1x"
        rows.sort(key=lambda row: _order(row, main))
        for row in rows:
            row.index, index = index, index + 1
        groups.append(Group(task, rows, lengths, main))
    return groups


def _order(row: Row, main: str) -> tuple[int, float]:
    """By loss; then those that diverged; then those that failed."""
    stat = row.loss.get(main)
    if stat is not None and stat.finite:
        return 0, stat.mean
    return (1 if row.done else 2), 0.0


def _differing(mappings: Sequence[dict[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for m in mappings for key in m)
    return [k for k in keys if len({json.dumps(m.get(k), sort_keys=True) for m in mappings}) > 1]


def _undecided(best: Stat, other: Stat) -> bool | None:
    """Whether two means lie within the larger of their spreads; None where one seed leaves that unknown."""
    if best.spread is None or other.spread is None:
        return None
    return abs(other.mean - best.mean) <= max(best.spread, other.spread)


# --- Text

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def _clean(value: object, limit: int = 400) -> str:
    """Text without control and direction-changing characters, at most `limit` long."""
    text = str(value)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return _UNSAFE.sub("\ufffd", text)


def _text(value: object, limit: int = 400) -> str:
    """Text for markup and for quoted attributes."""
    return html.escape(_clean(value, limit), quote=True)


def _value(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    )


def _quantity(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: '51.7 k tok/s', '65.5 KB', '1.20 M'. Small counts in full."""
    if not unit and value < 10_000 and value == int(value):
        return f"{value:.0f}"
    prefixes = ("B", "KB", "MB", "GB", "TB") if unit == "B" else ("", "k", "M", "G", "T", "P")
    step = 0
    while step < len(prefixes) - 1 and value >= 999.5:
        value, step = value / 1000, step + 1
    decimals = 0 if value >= 99.95 or (step == 0 and value == int(value)) else 1 if value >= 9.995 else 2
    return " ".join(filter(None, (f"{value:.{decimals}f}", prefixes[step], unit if unit != "B" else "")))


def _loss(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "diverged"


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # adding 0.0 turns -0.0 into 0.0


def _pm(stat: Stat) -> str:
    return _loss(stat.mean) + (f"\u00a0±\u00a0{stat.spread:.3f}" if stat.spread is not None else "")


def _listing(names: Sequence[str], limit: int = 8) -> str:
    """'a', 'a and b', 'a, b and 7 more'."""
    shown = list(names) if len(names) <= limit else [*names[: limit - 1], f"{len(names) - limit + 1} more"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# --- Page


def _page(results: Sequence[Result], title: str, plotly: str) -> str:
    groups = _groups(results)
    plots: list[dict[str, Any]] = []
    body = [f"<header><h1>{_text(title)}</h1>"]
    body += [_headline(group) for group in groups]
    body += [_facts(results), _warnings(results), _failures(results), "</header><main>"]
    cards = _Cards(groups)
    for number, group in enumerate(groups):
        suffix = f": {_text(group.task)}" if len(groups) > 1 else ""
        body.append(f"<h2>Results{suffix}</h2>{_table(group, cards)}")
        if group.ranked or any(row.curve() for row in group.rows):
            body.append(_curves(group, number, suffix, plots))
            body.append(_tradeoffs(group, number, suffix, plots))
            body.append(_extrapolation(group, number, suffix, plots))
    body += [cards.section(), _reproduce(results), "</main>"]
    nonce = secrets.token_urlsafe(18)
    policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data:"
    files = resources.files("regard.bench") / "templates"
    style, script = ((files / name).read_text("utf-8") for name in ("report.css", "report.js"))
    scripts = ""
    if plots:
        # ASCII-only JSON without '<' or '&' can neither end the script element nor hold a line separator.
        data = (
            json.dumps(plots, allow_nan=False)
            .replace("<", "\\u003c")
            .replace(">", "\\u003e")
            .replace("&", "\\u0026")
        )
        scripts = (
            f'<script type="application/json" id="plots" nonce="{nonce}">{data}</script>\n'
            f'<script nonce="{nonce}">{plotly}</script>\n<script nonce="{nonce}">{script}</script>'
        )
    content = "\n".join(part for part in body if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{_text(title)}</title>\n<style>\n{style}</style>\n</head>\n'
        f"<body>\n{content}\n{scripts}\n</body>\n</html>\n"
    )


def _headline(group: Group) -> str:
    where = f" on {_text(group.task)}"
    count = len({row.mechanism for row in group.rows})
    if not group.ranked:
        seen = f"{_plural(count, 'mechanism')} compared{where}"
        return f'<p class="answer">{seen}; none finished with a usable loss.</p>'
    best, *others = group.ranked
    stat = best.loss[group.main]
    at = "" if group.main == "1x" else f" at {_text(group.main)} the training length"
    figure = f"{_pm(stat)} bits per byte{at}"
    name = f"<strong>{_text(best.label, 80)}</strong>"
    seeds = "one seed" if stat.count == 1 else f"{stat.count} seeds"
    if not others:
        lead = f"{name} reaches {figure} on held-out data{where} ({seeds})"
        rest = "No other mechanism finished, so there is nothing to compare it with." if count > 1 else ""
        return f'<p class="answer">{lead}.</p><p>{rest}</p>' if rest else f'<p class="answer">{lead}.</p>'
    lead = f"Of {_plural(count, 'mechanism')}{where}, {name} predicts held-out data best: {figure} ({seeds})."
    second = others[0].loss[group.main]
    gap = f"{second.mean - stat.mean:.3f}"
    follower = f"{_text(others[0].label, 80)}, the next, is {gap} behind"
    close = [_text(r.label, 80) for r in others if _undecided(stat, r.loss[group.main])]
    if _undecided(stat, second) is None:
        rest = f"{follower}. With one seed the spread is unknown: the gap may be chance."
    elif close:
        rest = (
            f"{follower}. <strong>The difference from {_listing(close)} is within the spread</strong> "
            "over seeds, so these runs do not tell them apart."
        )
    else:
        rest = f"{follower}, which is more than the spread over seeds."
    return f'<p class="answer">{lead}</p><p>{rest}</p>'


FACTS: dict[str, tuple[str, ...]] = {
    "Data": ("data", "text", "dataset", "source", "files", "bytes", "tokenizer", "vocab"),
    "Model": ("dim", "depth", "heads", "num_heads", "layers", "host", "match"),
    "Budget": ("steps", "batch", "batch_size", "length", "learning_rate", "lr", "budget"),
    "Device": ("device", "dtype"),
}
"""Which settings the head of the page shows, under which word. All others stand at the end."""


def _facts(results: Sequence[Result]) -> str:
    common = _collected([r.cell.settings for r in results])
    surroundings = _collected([r.environment for r in results if r.environment])
    lines = []
    for word, keys in FACTS.items():
        parts = [f"{_words(k)} {_text(_listing(common[k], 4), 120)}" for k in keys if k in common]
        if word == "Device":
            parts += [_text(_listing(v, 3), 160) for k, v in surroundings.items() if "device" in k.lower()]
        if word == "Data":
            parts = [*(_text(task, 80) for task in dict.fromkeys(r.cell.task for r in results)), *parts]
        if word == "Budget" and (tokens := _tokens(common)):
            parts.append(f"{_quantity(tokens, 'tokens')} a run")
        if parts:
            lines.append(f"<dt>{word}</dt><dd>{' · '.join(parts)}</dd>")
    seeds = sorted({r.cell.seed for r in results})
    done = sum(r.status == "done" for r in results)
    runs = f"{_plural(done, 'run')} finished, {len(results) - done} failed"
    listed = ", ".join(map(str, seeds[:12])) + (" …" if len(seeds) > 12 else "")
    lines.append(f"<dt>Seeds</dt><dd>{_plural(len(seeds), 'seed')} ({listed}) · {runs}</dd>")
    return f"<dl>{''.join(lines)}</dl>"


def _tokens(common: dict[str, list[str]]) -> int | None:
    factors = [common.get("steps"), common.get("batch", common.get("batch_size")), common.get("length")]
    numbers = [int(f[0]) for f in factors if f is not None and len(f) == 1 and f[0].isdecimal()]
    return math.prod(numbers) if len(numbers) == 3 else None


def _collected(mappings: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Key -> its distinct values, as text, in order of appearance."""
    found: dict[str, dict[str, None]] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            found.setdefault(key, {})[_value(value)] = None
    return {key: list(values) for key, values in found.items()}


def _words(key: str) -> str:
    return _text(key.replace("_", " "), 60)


def _warnings(results: Sequence[Result]) -> str:
    lines = []
    for task in dict.fromkeys(r.cell.task for r in results):
        settings = [r.cell.settings for r in results if r.cell.task == task]
        differing = [key for key in _differing(settings) if all(key in found for found in settings)]
        if differing:
            lines.append(
                f"Not all runs share the same {_listing([_words(k) for k in differing])}: compare with care."
            )
    if differing := _differing([r.environment for r in results if r.status == "done"]):
        lines.append(
            f"The runs differ in {_listing([_words(k) for k in differing])}: compare speed with care."
        )
    return "".join(f'<p class="warning">{line}</p>' for line in dict.fromkeys(lines))


def _failures(results: Sequence[Result]) -> str:
    failed = [r for r in results if r.status != "done"]
    if not failed:
        return ""
    alike: dict[tuple[str, str], list[int]] = {}
    for r in failed:
        alike.setdefault((r.cell.mechanism, r.reason or "no reason recorded"), []).append(r.cell.seed)
    items = "".join(
        f"<li><strong>{_text(name, 80)}</strong> (seed{'s' if len(seeds) > 1 else ''} "
        f"{', '.join(map(str, seeds))}): {_text(reason)}</li>"
        for (name, reason), seeds in alike.items()
    )
    return f'<div class="warning"><h2>Failed: {_plural(len(failed), "run")}</h2><ul>{items}</ul></div>'


# --- Table


def _table(group: Group, cards: "_Cards") -> str:
    lengths = group.lengths or ["1x"]
    best: dict[str, float] = {}
    for length in lengths:
        means = [r.loss[length].mean for r in group.rows if length in r.loss and r.loss[length].finite]
        best[length] = min(means, default=math.nan)
    leading: dict[str, str] = {}
    for name, (_, unit, sign) in MEASURES.items():
        means = [r.measures[name].mean for r in group.rows if name in r.measures]
        # Compared as shown: a difference that the table cannot show is none worth a star.
        if sign and len({_quantity(mean, unit) for mean in means}) > 1:
            leading[name] = _quantity((max if sign > 0 else min)(means), unit)
    compared = len([r for r in group.rows if r.done]) > 1
    head = "".join(
        f'<th scope="col">{_text(length, 20)}<small>held-out bits/byte</small></th>' for length in lengths
    )
    head += "".join(f'<th scope="col">{heading}</th>' for heading, _, _ in MEASURES.values())
    body = []
    for row in group.rows:
        cells = "".join(_loss_cell(group, row, length, best[length], compared) for length in lengths)
        for name, (_, unit, _) in MEASURES.items():
            stat = row.measures.get(name)
            shown = DASH if stat is None else _quantity(stat.mean, unit)
            leads = stat is not None and shown == leading.get(name)
            if stat is not None and stat.spread and unit == "tok/s":
                shown += f"<small>± {_quantity(stat.spread, unit)}</small>"
            cells += _cell(shown, leads)
        runs = len(row.done) + len(row.failed)
        note = "" if not row.failed else f"<small>{len(row.failed)} of {_plural(runs, 'run')} failed</small>"
        body.append(f'<tr><th scope="row">{cards.link(row)}{note}</th>{cells}</tr>')
    several = any(len(row.done) > 1 for row in group.rows)
    over = "Mean ± sample standard deviation over seeds. " if several else ""
    legend = (
        f"{over}★ best mean of its column, ≈ not further from it than the spread, {DASH} not measured or not "
        "possible. Bits per byte, memory, state and FLOP: less is better; 1 KB = 1000 bytes. State: what one "
        "sequence keeps while streaming, after the training length."
    )
    caption = "<caption>Best first, by held-out loss</caption>"
    head = f'{caption}<thead><tr><th scope="col">Mechanism</th>{head}</tr></thead>'
    notes = dict.fromkeys((row.label, note) for row in group.rows for r in row.done for note in r.notes)
    lines = "".join(f"<li>{_text(label, 80)}: {_text(note)}</li>" for label, note in notes)
    notes_list = f'<ul class="note">{lines}</ul>' if lines else ""
    return f'{_scroll("Table of results", head, body)}<p class="note">{legend}</p>{notes_list}'


def _scroll(label: str, head: str, body: Sequence[str]) -> str:
    """A table that scrolls inside its own box, reachable by keyboard."""
    table = f"<table>{head}<tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{table}</div>'


def _loss_cell(group: Group, row: Row, length: str, best: float, compared: bool) -> str:
    stat = row.loss.get(length)
    if stat is None:
        return _cell(DASH, False)
    spread = "" if stat.spread is None else f"<small>± {stat.spread:.3f}</small>"
    if not compared or not stat.finite:
        return _cell(_loss(stat.mean) + spread, False)
    leader = next(r.loss[length] for r in group.rows if length in r.loss and r.loss[length].mean == best)
    mark = "≈ " if stat.mean != best and _undecided(leader, stat) else ""
    return _cell(mark + _loss(stat.mean) + spread, stat.mean == best)


def _cell(shown: str, best: bool) -> str:
    return f'<td class="best">★ {shown}</td>' if best else f"<td>{shown}</td>"


# --- Plots: data for report.js


def _look(row: Row) -> dict[str, Any]:
    return {
        "mechanism": row.index,
        "name": _clean(row.label, 80),
        "colour": row.index % COLOURS,
        "dash": tuple(DASHES)[row.index % len(DASHES)],
        "marker": tuple(MARKERS)[row.index % len(MARKERS)],
    }


def _key(rows: Sequence[Row]) -> str:
    """The legend, as buttons that hide and show a mechanism in every plot."""
    items = ""
    for row in rows:
        look = _look(row)
        ink = f"var(--c{look['colour']})"
        items += (
            f'<li><button type="button" aria-pressed="true" data-mechanism="{row.index}">'
            '<svg width="30" height="12" aria-hidden="true">'
            f'<path d="M1 6h28" stroke-width="2" stroke="{ink}" stroke-dasharray="{DASHES[look["dash"]]}"/>'
            f'<path d="{MARKERS[look["marker"]]}" fill="{ink}"/></svg>{_text(row.label, 80)}</button></li>'
        )
    return f'<ul class="key" aria-label="Key; press to hide or show a mechanism">{items}</ul>'


def _figure(plot: dict[str, Any], heading: str, caption: str, plots: list[dict[str, Any]]) -> str:
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


def _range(values: Sequence[float], pad: float, log: bool = False) -> list[float]:
    """An axis range around `values` with free space on both sides; in log10 units for a log axis."""
    found = [math.log10(v) if log else v for v in values]
    low, high = min(found), max(found)
    room = max(pad * (high - low), 0.01 * abs(high)) or 1.0
    return [low - room, high + room]


def _smoothed(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over stretches of equally many records; a curve of few records stays as it is."""
    stride = max(1, math.ceil(len(curve) / CURVE_POINTS))
    stretches = [curve[i : i + stride] for i in range(0, len(curve), stride)]
    return [
        (round(statistics.fmean(s for s, _ in part)), statistics.fmean(v for _, v in part))
        for part in stretches
    ]


def _spans(losses: Sequence[float]) -> bool:
    """Whether losses differ so much that only a log axis shows them all."""
    return min(losses) > 0 and max(losses) > 3 * min(losses)


def _digits(values: Iterable[float]) -> list[float | None]:
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values]


def _curves(group: Group, number: int, suffix: str, plots: list[dict[str, Any]]) -> str:
    heading = f"<h2>Training loss{suffix}</h2>"
    means = {row.index: _smoothed(row.curve()) for row in group.rows if row.curve()}
    rows = [row for row in group.rows if row.index in means]
    last = max((mean[-1][0] for mean in means.values()), default=0)
    points = [(step, v) for mean in means.values() for step, v in mean if math.isfinite(v)]
    if not points:
        return f"{heading}<p>No finite losses were recorded along the runs.</p>"
    seeds = [(row, _smoothed(r.curve)) for row in rows if len(row.done) > 1 for r in row.done]
    series = [
        _look(row) | {"x": [s for s, _ in curve], "y": _digits(v for _, v in curve), "faint": faint}
        for faint, curves in ((True, seeds), (False, [(row, means[row.index]) for row in rows]))
        for row, curve in curves
    ]
    # The fall from chance level would flatten the end of the run, where mechanisms differ.
    late = [v for step, v in points if step >= last / 2] or [v for _, v in points]
    late = [
        v for v in late if v <= 4 * statistics.median(late)
    ] or late  # a diverged run must not flatten the rest
    early = [v for step, v in points if step >= last / 20] or late
    room = max(3 * (max(late) - min(late)), 0.3 * (max(early) - max(late)))
    top = min(max(early), max(late) + room)
    seen = [v for _, v in points] + [v for _, curve in seeds for _, v in curve]
    low, high = _range([min(v for v in seen if math.isfinite(v)), top], 0.05)
    averaged = max(math.ceil(len(row.curve()) / CURVE_POINTS) for row in rows)
    caption = (
        f"Training loss by step for {_plural(len(rows), 'mechanism')}."
        + (" Strong: mean over seeds; faint: each seed." if seeds else "")
        + (f" Each point averages up to {averaged} records." if averaged > 1 else "")
        + (" What is higher runs off the top." if any(v > high for _, v in points) else "")
    )
    plot = {
        "id": f"curves-{number}",
        "height": 460,
        "series": series,
        "hover": "step %{x}: %{y:.3f}",
        "x": {"title": "step", "type": "linear", "range": _range([s for s, _ in points], 0.02)},
        "y": {"title": "training loss, bits per byte", "type": "linear", "range": [low, high]},
    }
    return f"{heading}{_key(rows)}{_figure(plot, '', caption, plots)}"


def _tradeoffs(group: Group, number: int, suffix: str, plots: list[dict[str, Any]]) -> str:
    def pace(row: Row) -> float | None:
        speed = row.measures.get("train_tokens_per_second")
        return 1e6 / speed.mean if speed else None

    def memory(row: Row) -> float | None:
        peak = row.measures.get("peak_memory_bytes")
        return peak.mean / 1e6 if peak else None

    figures = [
        _pareto(
            group,
            f"time-{number}",
            pace,
            ("time", "faster", "training time, seconds per million tokens"),
            plots,
        ),
        _pareto(
            group, f"memory-{number}", memory, ("memory", "leaner", "peak memory in training, MB"), plots
        ),
    ]
    return f'<h2>Quality against cost{suffix}</h2><div class="pair">{"".join(figures)}</div>'


def _front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other point beats in both coordinates (less is better), by rising x."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def _pareto(
    group: Group,
    identity: str,
    cost: Callable[[Row], float | None],
    words: tuple[str, str, str],
    plots: list[dict[str, Any]],
) -> str:
    what, better, axis = words
    rows = [(row, x) for row in group.ranked if (x := cost(row)) is not None]
    heading = f"Quality against {what}"
    if not rows:
        return f"<figure><h3>{heading}</h3><p>The runs recorded no {what}.</p></figure>"
    points = [(x, row.loss[group.main].mean) for row, x in rows]
    front = _front(points)
    series = []
    for i, (row, x) in enumerate(rows):
        stat = row.loss[group.main]
        series.append(
            _look(row)
            | {
                "x": _digits([x]),
                "y": _digits([stat.mean]),
                "label": _clean(row.label, 24),
                "front": i in front,
            }
            | ({"spread": [stat.spread]} if stat.spread is not None else {})
        )
    xs, ys = [x for x, _ in points], [y for _, y in points]
    ends = [
        y + side * (row.loss[group.main].spread or 0) for (row, _), y in zip(rows, ys) for side in (-1, 1)
    ]
    x_log, y_log = max(xs) > 8 * min(xs), _spans(ys)
    x_range = _range(xs, 0.16, x_log)
    y_range = _range([e for e in ends if e > 0 or not y_log], 0.1, y_log)
    edges = (10 ** x_range[1] if x_log else x_range[1], 10 ** y_range[1] if y_log else y_range[1])
    names = _listing([_text(rows[i][0].label, 80) for i in front])
    others = len(rows) > 1
    caption = (
        f"Held-out loss against {what}; lower left is better. "
        + (
            f"Dotted: the front, by means; nothing is both {better} and better than {names}."
            if others
            else ""
        )
    ).strip()
    plot = {
        "id": identity,
        "height": 400,
        "labels": True,
        "series": series,
        "front": _staircase([points[i] for i in front], edges) if others else None,
        "hover": "%{x:.4g}, %{y:.3f}",
        "x": {"title": axis, "type": "log" if x_log else "linear", "range": x_range},
        "y": {"title": "held-out, bits per byte", "type": "log" if y_log else "linear", "range": y_range},
    }
    return _figure(plot, heading, caption, plots)


def _staircase(front: Sequence[tuple[float, float]], edges: tuple[float, float]) -> dict[str, list[float]]:
    """The front's corners, led on to the plot's upper and right edge."""
    xs, ys = [x for x, _ in front], [y for _, y in front]
    return {"x": [xs[0], *xs, edges[0]], "y": [edges[1], *ys, ys[-1]]}


def _extrapolation(group: Group, number: int, suffix: str, plots: list[dict[str, Any]]) -> str:
    heading = f"<h2>Longer than trained{suffix}</h2>"
    lengths = group.lengths
    rows = [row for row in group.rows if any(s.finite for s in row.loss.values())]
    if len(lengths) < 2 or not rows:
        return f"{heading}<p>Held-out loss was measured at one length only.</p>"
    series, ends = [], []
    for row in rows:
        at = [i for i, length in enumerate(lengths) if length in row.loss]
        stats = [row.loss[lengths[i]] for i in at]
        series.append(
            _look(row)
            | {"x": at, "y": _digits(s.mean for s in stats), "spread": [s.spread or 0 for s in stats]}
        )
        ends += [s.mean + side * (s.spread or 0) for s in stats if s.finite for side in (-1, 1)]
    first, last = lengths[0], lengths[-1]
    growth = {
        row.label: row.loss[last].mean - row.loss[first].mean
        for row in rows
        if all(n in row.loss and row.loss[n].finite for n in (first, last))
    }
    caption = "Held-out loss on text longer than the training length; flat or falling is good."
    if len(growth) > 1:
        least, most = min(growth, key=growth.__getitem__), max(growth, key=growth.__getitem__)
        caption += (
            f" From {_text(first, 20)} to {_text(last, 20)} the loss rises least for {_text(least, 80)} "
            f"({_signed(growth[least])}) and most for {_text(most, 80)} ({_signed(growth[most])})."
        )
    log = _spans([s.mean for row in rows for s in row.loss.values() if s.finite])
    ends = [e for e in ends if e > 0 or not log]
    plot = {
        "id": f"lengths-{number}",
        "height": 420,
        "series": series,
        "hover": "%{y:.3f}",
        "x": {
            "title": "length, in training lengths",
            "type": "linear",
            "range": [-0.15, len(lengths) - 0.85],
            "tickvals": list(range(len(lengths))),
            "ticktext": [_clean(length, 20) for length in lengths],
        },
        "y": {
            "title": "held-out, bits per byte",
            "type": "log" if log else "linear",
            "range": _range(ends, 0.06, log),
        },
    }
    return f"{heading}{_key(rows)}{_figure(plot, '', caption, plots)}"


# --- Cards and reproduction

VERIFIED = {
    "equation": "against the paper's formula, written out on its own",
    "third-party": "against the formula and an independent implementation",
    "reconstructed": "against a reconstruction; the paper's own text could not be read",
}


def _find_card(name: str) -> Any | None:
    """The card, or None: a report of old results must not fail because a mechanism was renamed since."""
    try:
        from regard import catalog

        return catalog.card(name)
    except Exception:
        return None


def _parts(mechanism: str) -> list[str]:
    """The names of the cards behind 'gated+rotary' or 'kerple(log_space=True)'."""
    return [part.strip() for part in mechanism.partition("(")[0].split("+")]


class _Cards:
    """The section on the mechanisms; a part that several composites share is told once, then linked."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.names = list(dict.fromkeys(row.mechanism for group in groups for row in group.rows))
        found = {part: _find_card(part) for name in self.names for part in _parts(name)}
        self.cards = {part: card for part, card in found.items() if card is not None}
        told = [name for name in self.names if any(part in self.cards for part in _parts(name))]
        self.ids = {name: f"mechanism-{i}" for i, name in enumerate(told)}

    def link(self, row: Row) -> str:
        label = _text(row.label, 80)
        return f'<a href="#{self.ids[row.mechanism]}">{label}</a>' if row.mechanism in self.ids else label

    def section(self) -> str:
        if not self.ids:
            return ""
        # A part with a section of its own is told there, any other in the first section that has it.
        told = {name: identity for name, identity in self.ids.items() if name in self.cards}
        blocks = []
        for name, identity in self.ids.items():
            blocks.append(f'<section id="{identity}" aria-labelledby="{identity}-name">')
            blocks.append(f'<h3 id="{identity}-name">{_text(name, 80)}</h3>')
            for part in (p for p in _parts(name) if p in self.cards):
                card = self.cards[part]
                if told.setdefault(part, identity) != identity:
                    link = f'<a href="#{told[part]}">{_text(part, 80)}</a>'
                    blocks.append(f"<p>{link}: {_text(card.gist)}</p>")
                else:
                    blocks.append((f"<h4>{_text(part, 80)}</h4>" if part != name else "") + self._card(card))
            blocks.append("</section>")
        return f"<h2>The mechanisms</h2>{''.join(blocks)}"

    @staticmethod
    def _card(card: Any) -> str:
        paper = card.paper
        url = paper.url or ""
        name = _text(paper.title)
        shown = (
            f'<a href="{_text(url)}" rel="noreferrer">{name}</a>'
            if url.startswith("https://")
            else f"<cite>{name}</cite>"
        )
        source = f"{shown}. {_text(paper.authors)}, {_text(paper.year)}, {_text(paper.ref)}"
        source += f" ({_text(paper.equations)})" if paper.equations else ""
        lines = [("Paper", source)]
        if card.claim:
            lines.append(("Claim", _text(card.claim, 1000)))
        if card.differs:
            lines.append(("Differs", "<br>".join(_text(d, 1000) for d in card.differs)))
        lines.append(("Verified", _text(VERIFIED.get(card.verified, card.verified))))
        cost = f"time {_text(card.cost.time)}" if card.cost.time else ""
        state = f"state {_text(card.cost.state)}" if card.cost.state else "cannot stream"
        lines.append(("Cost", " · ".join(filter(None, (cost, state)))))
        terms = "".join(f"<dt>{word}</dt><dd>{value}</dd>" for word, value in lines)
        return f"<p>{_text(card.gist)}</p><pre>{_text(card.equation, 2000)}</pre><dl>{terms}</dl>"


def _reproduce(results: Sequence[Result]) -> str:
    settings = _collected([r.cell.settings for r in results])
    versions = _collected([r.environment for r in results if r.environment])

    def terms(found: dict[str, list[str]]) -> str:
        lines = ""
        for key, values in found.items():
            differs = "differs: " if len(values) > 1 else ""
            lines += f"<dt>{_words(key)}</dt><dd>{differs}{_text(_listing(values, 12), 1000)}</dd>"
        return lines

    rows = []
    for r in results:
        ended = next((_loss(r.heldout[n]) for n in sorted(r.heldout, key=_factor)), DASH)
        took = f"{r.seconds:.0f} s" if r.seconds else DASH
        cells = (_text(r.cell.task, 40), r.cell.seed, _text(r.status), ended, took)
        rows.append(
            f'<tr><th scope="row">{_text(r.cell.mechanism, 80)}</th>{"".join(f"<td>{c}</td>" for c in cells)}'
            f'<td class="text">{_text(r.checkpoint) or DASH}</td><td><code>{r.cell.key[:12]}</code></td></tr>'
        )
    names = ("Mechanism", "Task", "Seed", "Status", "Held-out", "Took", "Checkpoint", "Key")
    head = "".join(f'<th scope="col"{" class=text" if n == "Checkpoint" else ""}>{n}</th>' for n in names)
    parts = ["<h2>How to reproduce</h2>"]
    parts.append(
        "<p>The same command with the same settings and versions gives the same cells; a cell's key is a "
        "hash of its task, mechanism, seed and settings.</p>"
    )
    parts += [f"<h3>Settings</h3><dl>{terms(settings)}</dl>" if settings else ""]
    parts += [f"<h3>Versions and machine</h3><dl>{terms(versions)}</dl>" if versions else ""]
    parts += ["<h3>Every run</h3>", _scroll("Every run", f"<thead><tr>{head}</tr></thead>", rows)]
    return "".join(parts)
