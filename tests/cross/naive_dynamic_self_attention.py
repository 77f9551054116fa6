"""Dynamic self-attention, one token and one number at a time, by somebody who saw the equations only."""

import torch
from torch import Tensor

from naive import linear, softmax


def leaky_relu(u: Tensor, slope: float = 0.01) -> Tensor:
    return torch.stack([z if float(z.detach()) >= 0 else slope * z for z in u])


def route_one(
    tokens: list[Tensor], keep: Tensor | None, iterations: int = 2, detach_weights: bool = False
) -> tuple[Tensor, Tensor]:
    """T vectors (D,) and which of them are real -> z (D,), weights (T,)."""
    zero = torch.zeros((), dtype=tokens[0].dtype)
    real = [t for t in range(len(tokens)) if keep is None or bool(keep[t])]
    if not real:
        return torch.zeros_like(tokens[0]), torch.stack([zero for _ in tokens])
    logits = dict.fromkeys(real, zero)
    for _ in range(iterations):
        a = dict(zip(real, softmax([logits[t] for t in real]), strict=True))
        if detach_weights:
            a = {t: w.detach() for t, w in a.items()}
        s = torch.zeros_like(tokens[0])
        for t in real:
            s = s + a[t] * tokens[t]
        z = torch.tanh(s)
        logits = {t: logits[t] + (tokens[t] * z).sum() for t in real}
    return z, torch.stack([a.get(t, zero) for t in range(len(tokens))])


def naive_route(
    values: Tensor, keep: Tensor | None = None, iterations: int = 2, detach_weights: bool = False
) -> tuple[Tensor, Tensor]:
    """values (B, A, T, D), keep (B, T) -> pooled (B, A, D), weights (B, A, T)."""
    pooled, weights = [], []
    for b in range(values.shape[0]):
        pairs = [
            route_one(list(values[b, a]), None if keep is None else keep[b], iterations, detach_weights)
            for a in range(values.shape[1])
        ]
        pooled.append(torch.stack([z for z, _ in pairs]))
        weights.append(torch.stack([w for _, w in pairs]))
    return torch.stack(pooled), torch.stack(weights)


def naive_dynamic_self_attention(
    x: Tensor,
    W: Tensor,
    b: Tensor | None = None,
    *,
    num_attentions: int = 1,
    keep: Tensor | None = None,
    iterations: int = 2,
    slope: float = 0.01,
    detach_weights: bool = False,
) -> tuple[Tensor, Tensor]:
    """(B, T, M) -> pooled (B, A*D), weights (B, A, T)."""
    D = W.shape[0] // num_attentions
    values = []
    for n in range(x.shape[0]):
        u = [leaky_relu(linear(x[n, t], W, b), slope) for t in range(x.shape[1])]
        values.append(torch.stack([torch.stack([v[a * D : (a + 1) * D] for v in u]) for a in range(num_attentions)]))
    pooled, weights = naive_route(torch.stack(values), keep, iterations, detach_weights)
    return torch.stack([torch.cat(list(row)) for row in pooled]), weights


def naive_pair_features(h: Tensor, p: Tensor) -> Tensor:
    return torch.stack([torch.cat([h[n], p[n], (h[n] - p[n]).abs(), h[n] * p[n]]) for n in range(h.shape[0])])
