"""The table of results: a row a mechanism, a column a held-out length and a measure."""

from collections.abc import Sequence

from regard.bench.report.cards import Cards
from regard.bench.report.groups import MEASURES, Group, Row, Stat, undecided
from regard.bench.report.text import DASH, loss, plural, quantity, text


def table(group: Group, cards: Cards) -> str:
    """The table with its legend and the notes on what was not measured."""
    lengths = group.lengths or ["1x"]
    lowest = {length: _lowest(group.rows, length) for length in lengths}
    leading = _leading(group.rows)
    compared = sum(bool(row.done) for row in group.rows) > 1
    head = "".join(f'<th scope="col">{text(length, 20)}<small>held-out bits/byte</small></th>' for length in lengths)
    head += "".join(f'<th scope="col">{heading}</th>' for heading, _, _ in MEASURES.values())
    caption = "<caption>Best first, by held-out loss</caption>"
    head = f'{caption}<thead><tr><th scope="col">Mechanism</th>{head}</tr></thead>'
    body = []
    for row in group.rows:
        cells = [_loss_cell(row.loss.get(n), lowest[n] if compared else None) for n in lengths]
        cells += [_measure_cell(row.measures.get(name), name, leading.get(name)) for name in MEASURES]
        runs = len(row.done) + len(row.failed)
        note = f"<small>{len(row.failed)} of {plural(runs, 'run')} failed</small>" if row.failed else ""
        body.append(f'<tr><th scope="row">{cards.link(row)}{note}</th>{"".join(cells)}</tr>')
    return f'{scroll("Table of results", head, body)}<p class="note">{_legend(group)}</p>{_notes(group)}'


def scroll(label: str, head: str, body: Sequence[str]) -> str:
    """A table that scrolls inside its own box, reachable by keyboard."""
    inner = f"<table>{head}<tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{inner}</div>'


def _lowest(rows: Sequence[Row], length: str) -> Stat | None:
    finite = [row.loss[length] for row in rows if length in row.loss and row.loss[length].finite]
    return min(finite, key=lambda stat: stat.mean, default=None)


def _leading(rows: Sequence[Row]) -> dict[str, str]:
    """Measure -> its best value as shown, where the table shows more than one value."""
    leading = {}
    for name, (_, unit, sign) in MEASURES.items():
        means = [row.measures[name].mean for row in rows if name in row.measures]
        # Compared as shown: a difference that the table cannot show is none worth a star.
        if sign and len({quantity(mean, unit) for mean in means}) > 1:
            leading[name] = quantity((max if sign > 0 else min)(means), unit)
    return leading


def _loss_cell(stat: Stat | None, lowest: Stat | None) -> str:
    """`lowest` is the best of the column, or None where there is nothing to mark."""
    if stat is None:
        return _cell(DASH)
    shown = loss(stat.mean) + ("" if stat.spread is None else f"<small>± {stat.spread:.3f}</small>")
    if lowest is None or not stat.finite:
        return _cell(shown)
    best = stat.mean == lowest.mean
    return _cell(shown if best or not undecided(lowest, stat) else f"≈ {shown}", best)


def _measure_cell(stat: Stat | None, name: str, leading: str | None) -> str:
    if stat is None:
        return _cell(DASH)
    unit = MEASURES[name][1]
    shown = quantity(stat.mean, unit)
    spread = f"<small>± {quantity(stat.spread, unit)}</small>" if stat.spread and unit == "tok/s" else ""
    return _cell(shown + spread, best=shown == leading)


def _cell(shown: str, best: bool = False) -> str:
    return f'<td class="best">★ {shown}</td>' if best else f"<td>{shown}</td>"


def _legend(group: Group) -> str:
    several = any(len(row.done) > 1 for row in group.rows)
    return (
        f"{'Mean ± sample standard deviation over seeds. ' if several else ''}"
        f"★ best mean of its column, ≈ not further from it than the spread, {DASH} not measured or not "
        "possible. Bits per byte, memory, state and FLOP: less is better; 1 KB = 1000 bytes. State: what one "
        "sequence keeps while streaming, after the training length."
    )


def _notes(group: Group) -> str:
    notes = dict.fromkeys((row.label, note) for row in group.rows for r in row.done for note in r.notes)
    lines = "".join(f"<li>{text(label, 80)}: {text(note)}</li>" for label, note in notes)
    return f'<ul class="note">{lines}</ul>' if lines else ""
