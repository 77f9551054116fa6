"""The plot of training loss by step."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from regard.bench.report.groups import Group
from regard.bench.report.plots import axis, digits, figure, key, look
from regard.bench.report.text import clean, plural

CURVE_POINTS = 60
"""At most so many points a curve; longer ones are averaged over stretches of steps."""


def curves(group: Group, number: int, suffix: str, plots: list[dict[str, Any]]) -> str:
    """The section of one task; `number` and `suffix` tell it from the other tasks' sections."""
    heading = f"<h2>Training loss{suffix}</h2>"
    recorded = [(row, curve) for row in group.rows if (curve := row.curve())]
    means = [(row, _smoothed(curve)) for row, curve in recorded]
    points = [(step, v) for _, mean in means for step, v in mean if math.isfinite(v)]
    if not points:
        return f"{heading}<p>No finite losses were recorded along the runs.</p>"
    seeds = [(row, _smoothed(r.curve)) for row, _ in means if len(row.done) > 1 for r in row.done]
    series = [
        look(row) | {"x": [s for s, _ in curve], "y": digits(v for _, v in curve), "faint": faint}
        for faint, drawn in ((True, seeds), (False, means))
        for row, curve in drawn
    ]
    top = _top(points, max(mean[-1][0] for _, mean in means))
    seen = [v for _, curve in (*means, *seeds) for _, v in curve if math.isfinite(v)]
    y = axis(f"training loss, {clean(group.metric.loss)}", [min(seen), top], 0.05)
    averaged = max(math.ceil(len(curve) / CURVE_POINTS) for _, curve in recorded)
    caption = (
        f"Training loss by step for {plural(len(means), 'mechanism')}."
        + (" Strong: mean over seeds; faint: each seed." if seeds else "")
        + (f" Each point averages up to {averaged} records." if averaged > 1 else "")
        + (" What is higher runs off the top." if any(v > y["range"][1] for _, v in points) else "")
    )
    plot = {
        "id": f"curves-{number}",
        "height": 460,
        "series": series,
        "hover": "step %{x}: %{y:.3f}",
        "x": axis("step", [s for s, _ in points], 0.02),
        "y": y,
    }
    return f"{heading}{key([row for row, _ in means])}{figure(plot, '', caption, plots)}"


def _smoothed(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over stretches of equally many records; a curve of few records stays as it is."""
    stride = max(1, math.ceil(len(curve) / CURVE_POINTS))
    stretches = [curve[i : i + stride] for i in range(0, len(curve), stride)]
    return [(round(statistics.fmean(s for s, _ in part)), statistics.fmean(v for _, v in part)) for part in stretches]


def _top(points: Sequence[tuple[int, float]], last: int) -> float:
    """Where the plot ends: the fall from chance level would flatten the end, where mechanisms differ."""
    late = [v for step, v in points if step >= last / 2] or [v for _, v in points]
    # A diverged run must not flatten the rest.
    late = [v for v in late if v <= 4 * statistics.median(late)] or late
    early = [v for step, v in points if step >= last / 20] or late
    room = max(3 * (max(late) - min(late)), 0.3 * (max(early) - max(late)))
    return min(max(early), max(late) + room)
