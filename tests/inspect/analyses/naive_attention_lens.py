"""Sakarvadia et al.'s lens in plain loops, after the authors' code."""

import math

import torch
from torch import Tensor


def naive_lens(heads: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One token: (H, M) head outputs, (H, V, M) and (H, V) maps -> (V,) logits, summed over heads."""
    H, V, M = weight.shape
    out = torch.zeros(V, dtype=torch.float64)
    for h in range(H):
        for v in range(V):
            out[v] += sum(float(heads[h, m] * weight[h, v, m]) for m in range(M)) + float(bias[h, v])
    return out


def naive_kl(model: list[float], lens: list[float]) -> float:
    """KL(model || lens) of two rows of logits."""
    p, q = ([math.exp(x) for x in row] for row in (model, lens))
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
