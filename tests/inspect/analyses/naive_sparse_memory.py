"""Kanerva's memory in plain loops: all addresses counted one by one, or drawn at random on a sphere."""

import math
from itertools import product

import torch
from torch import Tensor


def naive_intersection(n: int, radius: int, distance: int) -> int:
    """How many of the 2^n addresses are within `radius` bits of two points `distance` bits apart."""
    second = [1] * distance + [0] * (n - distance)
    count = 0
    for address in product((0, 1), repeat=n):
        count += sum(address) <= radius and sum(a != b for a, b in zip(address, second, strict=True)) <= radius
    return count


def naive_weights(hamming: list[int], n: int, radius: int) -> list[float]:
    """Kanerva's read: each pattern weighed by the neurons that both it and the query activate."""
    counts = [naive_intersection(n, radius, d) for d in hamming]
    return [c / sum(counts) for c in counts]


def naive_beta(n: int, radius: int) -> float:
    """Least squares of the log of the intersection on the cosine 1 - 2 d / n, where it isn't empty."""
    points = [(1 - 2 * d / n, naive_intersection(n, radius, d)) for d in range(n + 1)]
    points = [(x, math.log(c)) for x, c in points if c]
    mx, my = (sum(p[k] for p in points) / len(points) for k in (0, 1))
    return sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)


def drawn_caps(n: int, cosine: float, bound: float, draws: int) -> float:
    """Share of random unit vectors whose cosine with both of two unit vectors is at least `bound`."""
    x = torch.randn(draws, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x / x.norm(dim=1, keepdim=True)
    second: Tensor = cosine * x[:, 0] + math.sqrt(1 - cosine**2) * x[:, 1]
    return float(((x[:, 0] >= bound) & (second >= bound)).double().mean())
