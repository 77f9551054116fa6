"""The entropy regulariser of entropy-guided attention written out with loops."""

import math

import torch
from torch import Tensor


def naive_row_entropy(attention: Tensor, eps: float = 1e-9) -> Tensor:
    """attention (L, B, H, T, S), rows sum to 1 -> E[l,b,h,i] = -sum_j A_ij log(A_ij + eps), (L, B, H, T)."""
    L, B, H, T, S = attention.shape
    rows = []
    for l in range(L):
        for b in range(B):
            for h in range(H):
                for i in range(T):
                    total = attention.new_zeros(())
                    for j in range(S):
                        a = attention[l, b, h, i, j]
                        total = total - a * torch.log(a + eps)
                    rows.append(total)
    return torch.stack(rows).view(L, B, H, T)


def naive_entropy(
    attention: Tensor,
    threshold: Tensor,
    *,
    gamma: float = 0.2,
    coefficient: float = 1.0,
    context_size: int | None = None,
    per: str = "row",
    eps: float = 1e-9,
) -> Tensor:
    """attention (L, B, H, T, S), threshold (L, H) or (H) -> scalar.

    E_max = log(context_size, by default S); d = E - threshold E_max; penalty d^2 if |d| > gamma E_max, else 0.
    per "row" (the released code): a penalty for every row, summed over rows and samples. per "head" (the paper's
    Algorithm 1): E averaged over the rows of a sample first, one penalty a sample and head, summed over samples.
    Then the mean over heads and over layers, times `coefficient`.
    """
    L, B, H, T, S = attention.shape
    E = naive_row_entropy(attention, eps)
    most = math.log(S if context_size is None else context_size)
    total = attention.new_zeros(())
    for l in range(L):
        for h in range(H):
            theta = threshold[l, h] if threshold.ndim == 2 else threshold[h]
            for b in range(B):
                found = [E[l, b, h, i] for i in range(T)]
                if per == "head":
                    found = [sum(found, attention.new_zeros(())) / T]
                for e in found:
                    d = e - theta * most
                    if abs(float(d)) > gamma * most:
                        total = total + d * d
    return coefficient * total / (H * L)


def naive_temperature_attention(q: Tensor, k: Tensor, v: Tensor, t: Tensor, *, causal: bool) -> Tensor:
    """q, k (B, H, T, D), v (B, H, T, V), temperatures t (H, T) by head and query -> (B, H, T, V).

    a_ij = softmax_j(q_i . k_j / (t_i sqrt(D))).
    """
    B, H, T, D = q.shape
    out = []
    for b in range(B):
        for h in range(H):
            for i in range(T):
                seen = range(i + 1) if causal else range(k.shape[2])
                logits = [torch.dot(q[b, h, i], k[b, h, j]) / (t[h, i] * math.sqrt(D)) for j in seen]
                largest = max(float(z) for z in logits)
                total = sum(((z - largest).exp() for z in logits), q.new_zeros(()))
                y = v.new_zeros(v.shape[-1])
                for z, j in zip(logits, seen, strict=True):
                    y = y + (z - largest).exp() / total * v[b, h, j]
                out.append(y)
    return torch.stack(out).view(B, H, T, -1)
