"""Walmer et al.'s attention distance, aligned maps and CKA in plain loops, after the authors' code."""

import torch
from torch import Tensor


def naive_without(maps: Tensor, extra: int) -> Tensor:
    """One head's map of one image: without the extra tokens, rows divided by their sums; rows of 0 stay."""
    T = maps.shape[0] - extra
    out = torch.zeros(T, T, dtype=torch.float64)
    for i in range(T):
        total = sum(float(maps[extra + i, extra + j]) for j in range(T))
        for j in range(T):
            out[i, j] = float(maps[extra + i, extra + j]) / (total or 1)
    return out


def naive_distance(maps: Tensor, grid: tuple[int, int], extra: int) -> float:
    """Mean over queries of the attended distance, in patches."""
    a, (Y, X) = naive_without(maps, extra), grid
    total = 0.0
    for i in range(Y * X):
        for j in range(Y * X):
            dy, dx = i // X - j // X, i % X - j % X
            total += float(a[i, j]) * (dy * dy + dx * dx) ** 0.5
    return total / (Y * X)


def naive_aligned(maps: Tensor, grid: tuple[int, int], extra: int) -> Tensor:
    """(2 Y - 1, 2 X - 1): each query moved to the centre, summed, over the number of queries."""
    a, (Y, X) = naive_without(maps, extra), grid
    out = torch.zeros(2 * Y - 1, 2 * X - 1, dtype=torch.float64)
    for i in range(Y * X):
        for j in range(Y * X):
            out[Y - 1 + j // X - i // X, X - 1 + j % X - i % X] += a[i, j] / (Y * X)
    return out


def naive_hsic(K: Tensor, L: Tensor) -> float:
    """Unbiased, of two Gram matrices whose diagonals count as 0."""
    n = K.shape[0]
    k = [[float(K[i, j]) * (i != j) for j in range(n)] for i in range(n)]
    m = [[float(L[i, j]) * (i != j) for j in range(n)] for i in range(n)]
    trace = sum(k[i][j] * m[j][i] for i in range(n) for j in range(n))
    sums = sum(map(sum, k)) * sum(map(sum, m)) / ((n - 1) * (n - 2))
    both = sum(k[i][j] * m[j][h] for i in range(n) for j in range(n) for h in range(n)) * 2 / (n - 2)
    return (trace + sums - both) / (n * (n - 3))


def naive_cka(xs: list[Tensor], ys: list[Tensor]) -> float:
    """Over batches of features (N, ...): HSIC summed, then the ratio."""
    grams = [(x.flatten(1) @ x.flatten(1).T, y.flatten(1) @ y.flatten(1).T) for x, y in zip(xs, ys, strict=True)]
    xy, xx, yy = (sum(naive_hsic(g[a], g[b]) for g in grams) for a, b in ((0, 1), (0, 0), (1, 1)))
    return xy / (xx * yy) ** 0.5
