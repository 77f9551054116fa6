"""The page's table: what each head does, in the numbers of `Trace.statistics`."""

import math
from typing import Any

from regard.inspect.traced import Traced

COLUMNS = {
    "entropy": ("entropy", "of a query's weights, in nats: 0 where all is on one key"),
    "maximum": ("largest", "a query's largest weight"),
    "distance": ("distance", "tokens between query and key, weighted by attention"),
    "first": ("first", "weight on the first token"),
    "separators": ("separators", "weight on [SEP], </s> and the like, the first token aside"),
    "itself": ("self", "weight on the query's own token"),
    "previous": ("previous", "weight on the token before"),
    "following": ("next", "weight on the token after"),
}
"""Field of HeadStatistics -> the column's name and what it says."""


def columns() -> list[dict[str, str]]:
    return [{"field": field, "name": name, "help": words} for field, (name, words) in COLUMNS.items()]


def table(trace: Traced) -> list[list[float | str | None]]:
    """One row for each head: the layer's place, the head's place in it, and a number for each column.

    JSON has no NaN and no infinity: these are words that JavaScript's Number reads.
    """
    seen: dict[int, int] = {}
    rows: list[list[float | str | None]] = []
    for one in trace.statistics():
        place = seen[one.layer] = seen.get(one.layer, -1) + 1
        rows.append([one.layer, place, *(_number(getattr(one, field)) for field in COLUMNS)])
    return rows


def _number(value: Any) -> float | str | None:
    if value is None or math.isfinite(value):
        return None if value is None else float(f"{value:.6g}")
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
