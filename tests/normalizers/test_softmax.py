"""Softmax as a normaliser against its definition in Python floats."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.normalizers import Softmax


def oracle(scores: Tensor, allowed: Tensor | None) -> Tensor:
    keep = torch.ones(scores.shape, dtype=torch.bool) if allowed is None else allowed.expand(scores.shape)
    weights = torch.zeros_like(scores)
    for row in np.ndindex(*scores.shape[:-1]):
        values = {s: float(scores[row][s]) for s in range(scores.shape[-1]) if keep[row][s]}
        if values:
            largest = max(values.values())
            total = sum(math.exp(v - largest) for v in values.values())
            for s, v in values.items():
                weights[row][s] = math.exp(v - largest) / total
    return weights


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_definition(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    B, H, T, S = (int(torch.randint(1, n, (), generator=g)) for n in (3, 4, 6, 9))
    scores = torch.randn(B, H, T, S, generator=g, dtype=torch.float64) * (0.3, 1.0, 300.0)[seed % 3]
    allowed = None if seed % 4 == 0 else torch.rand(B, (1, H)[seed % 2], T, S, generator=g) < 0.6
    got = Softmax()(scores, allowed)
    assert (got - oracle(scores, allowed)).abs().max() < 1e-12


def test_statistics_of_half_precision_are_kept_wide() -> None:
    scores = torch.zeros(1, 1, 1, 4097, dtype=torch.bfloat16)
    weights = Softmax()(scores, None)
    assert (weights.double() * 4097 - 1).abs().max() < 2**-8  # bf16 sums would stop growing at 256
