"""Chuang et al.'s lookback ratio in plain loops."""

import math

import torch
from torch import Tensor


def naive_lookback(maps: Tensor, n_prompt: int, context: int) -> Tensor:
    """One head's causal map of a whole sequence -> one ratio a step; row n_prompt - 1 + i predicts token i."""
    steps = maps.shape[0] - n_prompt + 1
    out = torch.zeros(steps, dtype=torch.float64)
    for i in range(steps):
        row, length = maps[n_prompt - 1 + i], n_prompt + i
        old = sum(float(row[j]) for j in range(context)) / context
        fresh = [float(row[j]) for j in range(context, length)]
        new = sum(fresh) / len(fresh) if fresh else math.nan
        out[i] = old / (old + new)
    return out
