"""Sun et al.'s massive activations in plain loops."""

from statistics import median_low

import torch
from torch import Tensor


def naive_massive(hidden: list[Tensor], floor: float, ratio: float) -> list[tuple[int, int, int, int]]:
    """(layer, sequence, token, width) of every |a| above the floor and above ratio times its sequence's median."""
    found = []
    for layer, h in enumerate(hidden):
        B, T, M = h.shape
        for b in range(B):
            size = [[abs(float(h[b, t, m])) for m in range(M)] for t in range(T)]
            middle = median_low([x for row in size for x in row])
            found += [
                (layer, b, t, m)
                for t in range(T)
                for m in range(M)
                if size[t][m] > floor and size[t][m] > ratio * middle
            ]
    return found


def naive_bias(weights: Tensor, values: Tensor, tokens: list[bool]) -> tuple[Tensor, Tensor]:
    """One head: what the marked tokens and what all others add to each output. (T, S), (S, V)."""
    T, S = weights.shape
    parts = torch.zeros(2, T, values.shape[1], dtype=torch.float64)
    for t in range(T):
        for s in range(S):
            parts[0 if tokens[s] else 1, t] += weights[t, s] * values[s]
    return parts[0], parts[1]
