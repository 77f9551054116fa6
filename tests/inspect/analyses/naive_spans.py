"""Attention between spans in plain loops."""

from torch import Tensor


def naive_span(maps: Tensor, queries: tuple[int, int], keys: tuple[int, int]) -> float:
    """One head: mean over queries of the weight on the keys."""
    total = sum(float(maps[i, j]) for i in range(*queries) for j in range(*keys))
    return total / (queries[1] - queries[0])
