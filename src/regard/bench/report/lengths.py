"""The plot of what is measured along an axis of the task: longer text, more pairs, more hops."""

from typing import Any

from regard.bench.report.groups import Group, Row
from regard.bench.report.plots import axis, digits, figure, key, look, spans
from regard.bench.report.text import clean, listing, quantity, text


def along(group: Group, number: int, suffix: str, plots: list[dict[str, Any]]) -> str:
    """The section of one task; `number` and `suffix` tell it from the other tasks' sections."""
    metric = group.metric
    if not metric.along:
        return ""
    longer = metric.by_length
    name = text(metric.name[:1].upper() + metric.name[1:])
    heading = "Longer than trained" if longer else f"{name} by {text(metric.along)}"
    heading = f"<h2>{heading}{suffix}</h2>"
    labels = [label for label in group.labels if longer or label != metric.main]
    rows = [row for row in group.rows if any(label in row.heldout and row.heldout[label].finite for label in labels)]
    if len(labels) < 2 or not rows:
        return f"{heading}<p>Held-out data was measured at one point only.</p>"
    series = []
    for row in rows:
        at = [i for i, label in enumerate(labels) if label in row.heldout]
        stats = [row.heldout[labels[i]] for i in at]
        line = {"x": at, "y": digits(s.mean for s in stats), "spread": [s.spread or 0 for s in stats]}
        series.append(look(row) | line)
    finite = [row.heldout[n] for row in rows for n in labels if n in row.heldout and row.heldout[n].finite]
    ends = [end for stat in finite for end in stat.ends]
    title = f"held-out, {clean(metric.name)}" if longer else clean(metric.name)
    plot = {
        "id": f"lengths-{number}",
        "height": 420,
        "series": series,
        "hover": "%{y:.1%}" if metric.percent else "%{y:.3f}",
        "x": {
            "title": clean(metric.along),
            "type": "linear",
            "range": [-0.15, len(labels) - 0.85],
            "tickvals": list(range(len(labels))),
            "ticktext": [clean(label, 20) for label in labels],
        },
        "y": axis(title, ends, 0.06, metric.better < 0 and spans([s.mean for s in finite]), metric.percent),
    }
    caption = _caption(group, labels[0], labels[-1]) + _states(rows)
    return f"{heading}{key(rows)}{figure(plot, '', caption, plots)}"


def _caption(group: Group, first: str, last: str) -> str:
    """What the plot shows, and who changes least and most from its one end to the other."""
    metric = group.metric
    if metric.by_length:
        said = "Held-out loss on text longer than the training length; flat or falling is good."
    else:
        wish = "higher" if metric.better > 0 else "lower"
        said = (
            f"Held-out {text(metric.name)} by {text(metric.along)}, mean over seeds with its spread; {wish} is better."
        )
    change = {
        row.label: row.heldout[last].mean - row.heldout[first].mean
        for row in group.rows
        if all(n in row.heldout and row.heldout[n].finite for n in (first, last))
    }
    if len(change) > 1:
        best = max(change, key=lambda name: metric.better * change[name])
        worst = min(change, key=lambda name: metric.better * change[name])
        verb = "falls" if metric.better > 0 else "rises"
        said += (
            f" From {text(first, 20)} to {text(last, 20)} it {verb} least for {text(best, 80)} "
            f"({_signed(group, change[best])}) and most for {text(worst, 80)} ({_signed(group, change[worst])})."
        )
    return said


def _signed(group: Group, change: float) -> str:
    number = group.metric.number(abs(change))
    sign = "" if float(number) == 0 else "+" if change > 0 else "\u2212"
    return f"{sign}{number}" + " points" * group.metric.percent


def _states(rows: list[Row]) -> str:
    """What each mechanism keeps of a sequence, where it was measured and not the same for all."""
    sizes = [quantity(s.mean, "B") if (s := row.measures.get("state_bytes")) else "" for row in rows]
    if len(set(sizes)) < 2:
        return ""
    told = [f"{text(row.label, 80)} {size}" for row, size in zip(rows, sizes) if size]
    return f" State kept of a sequence: {listing(told, 40)}."
