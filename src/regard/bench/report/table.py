"""The table of results: a row a mechanism, a column a held-out number and a measure."""

from collections.abc import Sequence

from regard.bench.report.cards import Cards
from regard.bench.report.groups import MEASURES, Group, Row, Stat, undecided
from regard.bench.report.text import DASH, plural, quantity, text
from regard.bench.report.verdict import verdict
from regard.tasks import Metric

GENERATION = "generate_tokens_per_second"


def table(group: Group, cards: Cards) -> str:
    """The table with its legend and the notes on what was not measured."""
    metric, labels = group.metric, group.labels or [group.metric.main]
    leading, told = _leading(group.rows), verdict(group)
    # Only language models generate.
    measures = {name: its for name, its in MEASURES.items() if metric.by_length or name != GENERATION}
    compared = sum(bool(row.done) for row in group.rows) > 1
    head = "".join(_heading(metric, label) for label in labels)
    head += "".join(f'<th scope="col">{heading}</th>' for heading, _, _ in measures.values())
    caption = f"<caption>Best first, by held-out {text(metric.name)}</caption>"
    head = f'{caption}<thead><tr><th scope="col">Mechanism</th>{head}</tr></thead>'
    body = []
    for row in group.rows:
        cells = [_heldout_cell(metric, row.heldout.get(n), group.best(n) if compared else None) for n in labels]
        if told and (pair := told.of(row)) and labels[0] == group.main:  # here a test decides, not the spread
            cells[0] = _cell(_shown(metric, row.heldout[group.main]), like=not pair.apart)
        cells += [_measure_cell(row.measures.get(name), name, leading.get(name)) for name in measures]
        runs = len(row.done) + len(row.failed)
        what = "refused" if row.failed and all(r.refused for r in row.failed) else "failed"
        note = f"<small>{len(row.failed)} of {plural(runs, 'run')} {what}</small>" if row.failed else ""
        body.append(f'<tr><th scope="row">{cards.link(row)}{note}</th>{"".join(cells)}</tr>')
    return f'{scroll("Table of results", head, body)}<p class="note">{_legend(group)}</p>{_notes(group)}'


def _heading(metric: Metric, label: str) -> str:
    """'1x', 'accuracy' or '4 pairs', and beneath it what that is."""
    title = label if label.endswith("x") else metric.title(label)
    return (
        f'<th scope="col">{text(title, 20)}<small>held-out {text(metric.short) * (title != metric.short)}</small></th>'
    )


def scroll(label: str, head: str, body: Sequence[str]) -> str:
    """A table that scrolls inside its own box, reachable by keyboard."""
    inner = f"<table>{head}<tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{inner}</div>'


def _leading(rows: Sequence[Row]) -> dict[str, Stat]:
    """Measure -> its best, where the table shows more than one value."""
    leading = {}
    for name, (_, unit, sign) in MEASURES.items():
        stats = [row.measures[name] for row in rows if name in row.measures]
        # Compared as shown: a difference that the table cannot show is none worth a star.
        if sign and len({quantity(stat.mean, unit) for stat in stats}) > 1:
            leading[name] = (max if sign > 0 else min)(stats, key=lambda stat: stat.mean)
    return leading


def _heldout_cell(metric: Metric, stat: Stat | None, leader: Stat | None) -> str:
    """`leader` is the best of the column, or None where there is nothing to mark."""
    if stat is None:
        return _cell(DASH)
    if not stat.finite:
        return _cell("diverged")
    best = leader is not None and stat.mean == leader.mean
    return _cell(_shown(metric, stat), best, leader is not None and undecided(leader, stat))


def _shown(metric: Metric, stat: Stat) -> str:
    return metric.write(stat.mean) + ("" if stat.spread is None else f"<small>± {metric.number(stat.spread)}</small>")


def _measure_cell(stat: Stat | None, name: str, leader: Stat | None) -> str:
    if stat is None:
        return _cell(DASH)
    unit = MEASURES[name][1]
    shown = quantity(stat.mean, unit)
    spread = f"<small>± {quantity(stat.spread, unit)}</small>" if stat.spread and unit == "tok/s" else ""
    if leader is None:
        return _cell(shown + spread)
    return _cell(shown + spread, shown == quantity(leader.mean, unit), undecided(leader, stat))


def _cell(shown: str, best: bool = False, like: bool = False) -> str:
    """`like`: not told apart from the best."""
    if best:
        return f'<td class="best">★ {shown}</td>'
    return f"<td>{'≈ ' * like}{shown}</td>"


def _legend(group: Group) -> str:
    metric, several = group.metric, any(len(row.done) > 1 for row in group.rows)
    return (
        f"{'Mean ± sample standard deviation over seeds. ' if several else ''}"
        "★ best mean of its column; ≈ not told apart from it: in the first column by the test named above, in all "
        f"others because it is no further from it than the spread; {DASH} not measured or not possible. "
        f"{text(metric.name[:1].upper() + metric.name[1:])}: {'more' if metric.better > 0 else 'less'} is better. "
        "Speeds are measured when all is trained, in turns: median over the rounds ± half the distance of the "
        "quartiles. Memory is the peak of a process of its own. Memory, state and FLOP: less is better; 1 KB = 1000 "
        "bytes. State: what one sequence keeps while streaming, after the length of an example. FLOP: two for each "
        "multiply-add of one example's forward pass; attention is charged the pairs that its mask allows, elementwise "
        "work and softmax are free. Tokens are what is mixed: bytes, pixels, nodes, steps."
    )


def _notes(group: Group) -> str:
    notes = dict.fromkeys((row.label, note) for row in group.rows for r in row.done for note in r.notes)
    lines = "".join(f"<li>{text(label, 80)}: {text(note)}</li>" for label, note in notes)
    return f'<ul class="note">{lines}</ul>' if lines else ""
