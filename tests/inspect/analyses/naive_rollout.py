"""Attention rollout and attention flow in plain loops, after Abnar and Zuidema's definitions."""

from itertools import combinations

import torch
from torch import Tensor


def naive_steps(attention: list[Tensor], residual: float, heads: str) -> list[list[list[float]]]:
    """(L, T, T): what one example's layers pass on, heads merged, the residual mixed in, rows divided by their sum."""
    steps = []
    for layer in attention:
        H, T, _ = layer.shape
        step = []
        for i in range(T):
            row = []
            for j in range(T):
                seen = [float(layer[h, i, j]) for h in range(H)]
                merged = {"mean": sum(seen) / H, "max": max(seen), "min": min(seen)}[heads]
                row.append((1 - residual) * merged + residual * (i == j))
            total = sum(row)
            step.append([x / total if total else 0.0 for x in row])
        steps.append(step)
    return steps


def naive_rollout(attention: list[Tensor], residual: float = 0.5, heads: str = "mean") -> Tensor:
    """(L, T, T): sums over all paths, token by token."""
    steps = naive_steps(attention, residual, heads)
    T = len(steps[0])
    below = [[float(i == j) for j in range(T)] for i in range(T)]
    found = []
    for step in steps:
        above = [[0.0] * T for _ in range(T)]
        for i in range(T):
            for j in range(T):
                for k in range(T):
                    above[i][j] += step[i][k] * below[k][j]
        found.append(above)
        below = above
    return torch.tensor(found, dtype=torch.float64)


def naive_flow(attention: list[Tensor], residual: float = 0.5) -> Tensor:
    """(L, T, T): the greatest flow from each node to each input is the least cut, tried over all sets of nodes.

    A cut is a set of nodes with the source and without the sink; edges leave it downwards. 2^(nodes) sets: T <= 3.
    """
    steps = naive_steps(attention, residual, "mean")
    L, T = len(steps), len(steps[0])
    found = torch.zeros(L, T, T, dtype=torch.float64)
    for layer in range(L):
        nodes = [(level, i) for level in range(layer + 2) for i in range(T)]
        for source in range(T):
            for sink in range(T):
                free = [n for n in nodes if n not in ((layer + 1, source), (0, sink))]
                least = float("inf")
                for size in range(len(free) + 1):
                    for chosen in combinations(free, size):
                        inside = {(layer + 1, source), *chosen}
                        cut = 0.0
                        for level, i in inside:
                            for j in range(T):
                                if level and (level - 1, j) not in inside:
                                    cut += steps[level - 1][i][j]
                        least = min(least, cut)
                found[layer, source, sink] = least
    return found / found.sum(-1, keepdim=True)
