"""The plots of quality against cost, with the front of what nothing else beats in both."""

from collections.abc import Sequence
from typing import Any

from regard.bench.report.groups import Group, Row
from regard.bench.report.plots import axis, digits, figure, look, spans
from regard.bench.report.text import clean, listing, text


def tradeoffs(group: Group, number: int, suffix: str, plots: list[dict[str, Any]]) -> str:
    """The section of one task; `number` and `suffix` tell it from the other tasks' sections."""
    time = [(row, 1e6 / speed.mean) for row in group.ranked if (speed := row.measures.get("train_tokens_per_second"))]
    memory = [(row, peak.mean / 1e6) for row in group.ranked if (peak := row.measures.get("peak_memory_bytes"))]
    state = [(row, kept.mean / 1e3) for row in group.ranked if (kept := row.measures.get("state_bytes"))]
    drawn = [
        _pareto(group, time, f"time-{number}", ("time", "faster", "training time, seconds per million tokens"), plots),
        _pareto(group, memory, f"memory-{number}", ("memory", "leaner", "peak memory in training, MB"), plots),
    ]
    if len({kept for _, kept in state}) > 1:
        words = ("state", "smaller", "state kept of a sequence, KB")
        drawn.append(_pareto(group, state, f"state-{number}", words, plots))
    return f'<h2>Quality against cost{suffix}</h2><div class="pair">{"".join(drawn)}</div>'


def _pareto(
    group: Group,
    costs: Sequence[tuple[Row, float]],
    identity: str,
    words: tuple[str, str, str],
    plots: list[dict[str, Any]],
) -> str:
    what, better, title = words
    metric = group.metric
    heading = f"Quality against {what}"
    if not costs:
        return f"<figure><h3>{heading}</h3><p>The runs recorded no {what}.</p></figure>"
    stats = [row.heldout[group.main] for row, _ in costs]
    xs, ys = [cost for _, cost in costs], [stat.mean for stat in stats]
    points = list(zip(xs, ys))
    front = _front([(x, -metric.better * y) for x, y in points])
    series = []
    for i, ((row, x), stat) in enumerate(zip(costs, stats)):
        point: dict[str, Any] = {
            "x": digits([x]),
            "y": digits([stat.mean]),
            "label": clean(row.label, 24),
            "front": i in front,
        }
        spread = {} if stat.spread is None else {"spread": [stat.spread]}
        series.append(look(row) | point | spread)
    ends = [end for stat in stats for end in stat.ends]
    x_axis = axis(title, xs, 0.16, max(xs) > 8 * min(xs))
    y_axis = axis(f"held-out {clean(metric.name)}", ends, 0.1, metric.better < 0 and spans(ys), metric.percent)
    side = "upper" if metric.better > 0 else "lower"
    caption = f"Held-out {text(metric.name)} against {what}; {side} left is better."
    if len(costs) > 1:
        names = listing([text(costs[i][0].label, 80) for i in front])
        caption += f" Dotted: the front, by means; nothing is both {better} and better than {names}."
    plot = {
        "id": identity,
        "height": 400,
        "labels": True,
        "series": series,
        "front": _staircase([points[i] for i in front], x_axis, y_axis, metric.better) if len(costs) > 1 else None,
        "hover": "%{x:.4g}, " + ("%{y:.1%}" if metric.percent else "%{y:.3f}"),
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
    front: Sequence[tuple[float, float]], x_axis: dict[str, Any], y_axis: dict[str, Any], better: int
) -> dict[str, list[float]]:
    """The front's corners, led on to the plot's right edge and to the one where nothing is good."""
    ends = ((x_axis, x_axis["range"][1]), (y_axis, y_axis["range"][0 if better > 0 else 1]))
    right, worst = (10**end if its["type"] == "log" else end for its, end in ends)
    xs, ys = [x for x, _ in front], [y for _, y in front]
    return {"x": [xs[0], *xs, right], "y": [worst, *ys, ys[-1]]}
