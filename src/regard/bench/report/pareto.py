"""The plots of quality against cost, with the front of what nothing else beats in both."""

from collections.abc import Sequence
from typing import Any

from regard.bench.report.groups import Group, Row
from regard.bench.report.plots import axis, digits, figure, look, spans
from regard.bench.report.text import clean, listing, text


def tradeoffs(group: Group, number: int, suffix: str, plots: list[dict[str, Any]]) -> str:
    """The section of one task; `number` and `suffix` tell it from the other tasks' sections."""
    speeds = [(row, row.measures.get("train_tokens_per_second")) for row in group.ranked]
    peaks = [(row, row.measures.get("peak_memory_bytes")) for row in group.ranked]
    time = _pareto(
        group.main,
        [(row, 1e6 / speed.mean) for row, speed in speeds if speed],
        f"time-{number}",
        ("time", "faster", "training time, seconds per million tokens"),
        plots,
    )
    memory = _pareto(
        group.main,
        [(row, peak.mean / 1e6) for row, peak in peaks if peak],
        f"memory-{number}",
        ("memory", "leaner", "peak memory in training, MB"),
        plots,
    )
    return f'<h2>Quality against cost{suffix}</h2><div class="pair">{time}{memory}</div>'


def _pareto(
    length: str,
    costs: Sequence[tuple[Row, float]],
    identity: str,
    words: tuple[str, str, str],
    plots: list[dict[str, Any]],
) -> str:
    what, better, title = words
    heading = f"Quality against {what}"
    if not costs:
        return f"<figure><h3>{heading}</h3><p>The runs recorded no {what}.</p></figure>"
    stats = [row.loss[length] for row, _ in costs]
    xs, ys = [x for _, x in costs], [stat.mean for stat in stats]
    points = list(zip(xs, ys))
    front = _front(points)
    series = []
    for i, ((row, x), stat) in enumerate(zip(costs, stats)):
        point = {
            "x": digits([x]),
            "y": digits([stat.mean]),
            "label": clean(row.label, 24),
            "front": i in front,
        }
        spread = {} if stat.spread is None else {"spread": [stat.spread]}
        series.append(look(row) | point | spread)
    x_axis = axis(title, xs, 0.16, max(xs) > 8 * min(xs))
    y_axis = axis("held-out, bits per byte", [end for stat in stats for end in stat.ends], 0.1, spans(ys))
    caption = f"Held-out loss against {what}; lower left is better."
    if len(costs) > 1:
        names = listing([text(costs[i][0].label, 80) for i in front])
        caption += f" Dotted: the front, by means; nothing is both {better} and better than {names}."
    plot = {
        "id": identity,
        "height": 400,
        "labels": True,
        "series": series,
        "front": _staircase([points[i] for i in front], x_axis, y_axis) if len(costs) > 1 else None,
        "hover": "%{x:.4g}, %{y:.3f}",
        "x": x_axis,
        "y": y_axis,
    }
    return figure(plot, heading, caption, plots)


def _front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other point beats in both coordinates (less is better), by rising x."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def _staircase(
    front: Sequence[tuple[float, float]], x_axis: dict[str, Any], y_axis: dict[str, Any]
) -> dict[str, list[float]]:
    """The front's corners, led on to the plot's upper and right edge."""
    right, top = (10 ** a["range"][1] if a["type"] == "log" else a["range"][1] for a in (x_axis, y_axis))
    xs, ys = [x for x, _ in front], [y for _, y in front]
    return {"x": [xs[0], *xs, right], "y": [top, *ys, ys[-1]]}
