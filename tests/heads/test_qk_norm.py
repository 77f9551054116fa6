"""Query-key normalisation against loops, and torch's own RMS norm."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.heads import QKNorm


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_formula(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    B, G, R, T, S, D = (int(torch.randint(1, n, (), generator=g)) for n in (3, 3, 4, 5, 5, 6))
    eps = (1e-6, 1e-2)[seed % 2]
    part = QKNorm(D, eps=eps).double()
    weights = normal(seed, D), normal(seed + 1, D)
    with torch.no_grad():
        part.q_weight.copy_(weights[0])
        part.k_weight.copy_(weights[1])
    q, k, v = normal(seed + 2, B, G * R, T, D), normal(seed + 3, B, G, S, D), normal(seed + 4, B, G, S, D)
    got = part(q, k, v)
    assert torch.equal(got[2], v)
    for z, weight, result in zip((q, k), weights, got[:2], strict=True):
        want = torch.zeros_like(z)
        for row in np.ndindex(*z.shape[:-1]):
            size = math.sqrt(sum(float(value) ** 2 for value in z[row]) / D + eps)
            for d in range(D):
                want[row][d] = z[row][d] / size * weight[d]
        assert (result - want).abs().max() < 1e-12
        assert (result - torch.nn.functional.rms_norm(z, (D,), weight, eps)).abs().max() < 1e-12


def test_logits_are_bounded_whatever_the_input() -> None:
    """sqrt(D) max|w_q w_k|, where plain products of the same queries and keys are many times that."""
    part = QKNorm(4).double()
    with torch.no_grad():
        part.q_weight.copy_(normal(1, 4))
        part.k_weight.copy_(normal(2, 4))
        bound = math.sqrt(4) * (part.q_weight * part.k_weight).abs().max()
        for size in (1.0, 1e3, 1e6):
            q, k = size * normal(3, 2, 3, 50, 4), size * normal(4, 2, 3, 60, 4)
            q, k, _ = part(q, k, k)
            assert (q @ k.mT / math.sqrt(4)).abs().max() <= bound


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"QKNorm: head_dim is too small \(got 0\); expected an int >= 1"):
        QKNorm(0)
    with pytest.raises(ValueError, match=r"QKNorm: eps is out of range \(got -1.0\); expected a finite number >= 0"):
        QKNorm(4, eps=-1.0)
    q, k = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 6)
    with pytest.raises(
        ValueError, match=r"QKNorm: k has the wrong shape \(got \(2, 3, 5, 6\)\); expected \(B = 2, G, S, D = 4"
    ):
        QKNorm(4)(q, k, q)
