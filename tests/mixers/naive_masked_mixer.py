"""Masked mixer (Badger 2024, arXiv 2409.01482): the token mixing of a block, by loops over tokens."""

import math

import torch
from torch import Tensor


def naive_masked_mixer(x: Tensor, weight: Tensor, bias: Tensor, *, causal: bool = True) -> Tensor:
    """Flat form. x (B,t,M) with t <= T, weight (T,T) or (T,T,K) with K odd, bias (T) -> y (B,t,M), float64.

    y[t,m] = sum_{s<=t} sum_j weight[t,s,j] x[s, m + j - (K-1)/2] + bias[t]; features outside 0 .. M-1 count as 0.
    Not causal: the sum is over all s. x is what enters the mixing (after the first layer norm).
    """
    x, weight, bias = x.double(), weight.double(), bias.double()
    if weight.dim() == 2:
        weight = weight[..., None]
    B, T, M = x.shape
    K = weight.shape[2]
    rows = []
    for b in range(B):
        for t in range(T):
            cells = []
            for m in range(M):
                total = bias[t]
                for s in range(t + 1 if causal else T):
                    for j in range(K):
                        at = m + j - (K - 1) // 2
                        if 0 <= at < M:
                            total = total + weight[t, s, j] * x[b, s, at]
                cells.append(total)
            rows.append(torch.stack(cells))
    return torch.stack(rows).reshape(B, T, M)


def naive_masked_mixer_expanded(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, causal: bool = True
) -> Tensor:
    """Expanded form: two masked T x T maps (T,T) with a GELU (erf) between them. x (B,t,M) -> (B,t,M)."""
    hidden = naive_masked_mixer(x, w1, b1, causal=causal)
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return naive_masked_mixer(hidden, w2, b2, causal=causal)


def naive_masked_mixer_heads(
    x: Tensor,
    proj: list[tuple[Tensor, Tensor]],
    mixing: list[tuple[Tensor, Tensor]],
    out: tuple[Tensor, Tensor],
    *,
    causal: bool = True,
) -> Tensor:
    """Heads: head i projects by proj[i] = (weight (w,M), bias (w)), mixes by mixing[i] = ((T,T), (T)); concatenated and
    then out = (weight (M, heads*w), bias (M)). x (B,t,M) -> (B,t,M).
    """
    x = x.double()
    B, T, _ = x.shape
    heads = []
    for (weight, bias), (mix, mix_bias) in zip(proj, mixing, strict=True):
        projected = torch.stack(
            [weight.double() @ x[b, t] + bias.double() for b in range(B) for t in range(T)]
        ).reshape(B, T, -1)
        heads.append(naive_masked_mixer(projected, mix, mix_bias, causal=causal))
    joined = torch.cat(heads, -1)
    weight, bias = (z.double() for z in out)
    return torch.stack([weight @ joined[b, t] + bias for b in range(B) for t in range(T)]).reshape(B, T, -1)


def naive_masked_mixer_block(
    x: Tensor, mixed: Tensor, norm_2: tuple[Tensor, Tensor], ff: tuple[Tensor, Tensor, Tensor, Tensor]
) -> Tensor:
    """The rest of a block: x <- x + mixed; x <- x + FF(LN_2(x)), FF = W2 gelu(W1 . + b1) + b2."""
    z = x.double() + mixed
    w1, b1, w2, b2 = (p.double() for p in ff)
    rows = []
    for token in naive_layer_norm(z, *norm_2).reshape(-1, x.shape[-1]):
        hidden = w1 @ token + b1
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        rows.append(w2 @ hidden + b2)
    return z + torch.stack(rows).reshape(z.shape)


def naive_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Over the last axis, eps 1e-5."""
    rows = []
    for token in x.double().reshape(-1, x.shape[-1]):
        centred = token - token.mean()
        rows.append(centred / torch.sqrt((centred * centred).mean() + 1e-5) * weight.double() + bias.double())
    return torch.stack(rows).reshape(x.shape)
