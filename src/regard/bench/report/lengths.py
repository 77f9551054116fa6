"""The plot of held-out loss on text longer than the training length."""

from typing import Any

from regard.bench.report.groups import Group
from regard.bench.report.plots import axis, digits, figure, key, look, spans
from regard.bench.report.text import clean, signed, text


def extrapolation(group: Group, number: int, suffix: str, plots: list[dict[str, Any]]) -> str:
    """The section of one task; `number` and `suffix` tell it from the other tasks' sections."""
    heading = f"<h2>Longer than trained{suffix}</h2>"
    lengths = group.lengths
    rows = [row for row in group.rows if any(s.finite for s in row.loss.values())]
    if len(lengths) < 2 or not rows:
        return f"{heading}<p>Held-out loss was measured at one length only.</p>"
    series = []
    for row in rows:
        at = [i for i, length in enumerate(lengths) if length in row.loss]
        stats = [row.loss[lengths[i]] for i in at]
        line = {"x": at, "y": digits(s.mean for s in stats), "spread": [s.spread or 0 for s in stats]}
        series.append(look(row) | line)
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
            f" From {text(first, 20)} to {text(last, 20)} the loss rises least for {text(least, 80)} "
            f"({signed(growth[least])}) and most for {text(most, 80)} ({signed(growth[most])})."
        )
    finite = [s for row in rows for s in row.loss.values() if s.finite]
    ends = [end for stat in finite for end in stat.ends]
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
            "ticktext": [clean(length, 20) for length in lengths],
        },
        "y": axis("held-out, bits per byte", ends, 0.06, spans([s.mean for s in finite])),
    }
    return f"{heading}{key(rows)}{figure(plot, '', caption, plots)}"
