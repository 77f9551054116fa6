"""Top-k attention weights in plain loops, row by row, and the paper's gradient."""

import math
from itertools import product

import torch
from torch import Tensor


def naive_kept(z: list[float], k: int) -> list[bool]:
    """Every score that is at least the k-th greatest; all of them where there are fewer than k."""
    threshold = sorted(z, reverse=True)[min(k, len(z)) - 1]
    return [value >= threshold for value in z]


def naive_row(z: list[float], k: int) -> list[float]:
    """Softmax over the kept scores, 0 elsewhere."""
    kept, top = naive_kept(z, k), max(z)
    parts = [math.exp(value - top) if keep else 0.0 for value, keep in zip(z, kept, strict=True)]
    return [part / sum(parts) for part in parts]


def naive_topk(scores: Tensor, k: int, allowed: Tensor | None = None) -> Tensor:
    """Weights (..., S). Masked keys are left out of their row; a row without any key is all 0."""
    weights = torch.zeros_like(scores)
    for row, keys in _rows(scores, allowed):
        for s, weight in zip(keys, naive_row([float(scores[row][s]) for s in keys], k), strict=True):
            weights[row][s] = weight
    return weights


def naive_gradient(p: Tensor, dp: Tensor) -> Tensor:
    """Gradient on the weights p (..., S) -> on the scores: the softmax's Jacobian where a key is kept, else 0."""
    dz = torch.zeros_like(p)
    for row, keys in _rows(p, None):
        for s in keys:
            for other in keys:
                change = float(p[row][other]) * (float(s == other) - float(p[row][s]))
                dz[row][s] += change * float(dp[row][other])
    return dz


def _rows(scores: Tensor, allowed: Tensor | None) -> list[tuple[tuple[int, ...], list[int]]]:
    """The index of every row that has keys, and its keys."""
    keep = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed.expand(scores.shape)
    rows = product(*(range(n) for n in scores.shape[:-1]))
    found = [(row, [s for s in range(scores.shape[-1]) if keep[row][s]]) for row in rows]
    return [(row, keys) for row, keys in found if keys]
