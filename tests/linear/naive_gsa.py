"""Gated slot attention and its ungated ancestor ABC in loops, token by token.

Written from the equations alone, by someone who has read neither code nor test of the library, but for the silu on the
values of the layer and the factor of its queries: the authors' layer has both, the equations had neither.
"""

import math

import torch

from naive import linear, softmax


def silu(z):
    return z * torch.sigmoid(z)


def gates(raw, temperature=8.0):
    """raw = x Wf -> log decay f, write strength s = 1 - exp(f)."""
    f = (torch.clamp(raw, max=0) - torch.log1p(torch.exp(-raw.abs()))) / temperature
    return f, -torch.expm1(f)


def read(q, keys, values):
    """softmax over slots of q keys^T / sqrt(D), times values; keys, values lists of m vectors."""
    p = softmax([(q * key).sum() / math.sqrt(len(q)) for key in keys])
    return sum(w * val for w, val in zip(p, values, strict=True))


def gsa(q, k, v, s, f, state=None):
    """q, k (B,T,H,D), v (B,T,H,V), s, f (B,T,H,m) -> o (B,T,H,V), K~ (B,H,m,D), V~ (B,H,m,V)."""
    batch, length, heads, d = q.shape
    m, v_dim = s.shape[3], v.shape[3]
    outs, end_k, end_v = [], [], []
    for b in range(batch):
        for h in range(heads):
            keys = [q.new_zeros(d) if state is None else state[0][b, h, j] for j in range(m)]
            values = [q.new_zeros(v_dim) if state is None else state[1][b, h, j] for j in range(m)]
            for t in range(length):
                for j in range(m):
                    keys[j] = torch.exp(f[b, t, h, j]) * keys[j] + s[b, t, h, j] * k[b, t, h]
                    values[j] = torch.exp(f[b, t, h, j]) * values[j] + s[b, t, h, j] * v[b, t, h]
                outs.append(read(q[b, t, h], keys, values))
            end_k.append(torch.stack(keys))
            end_v.append(torch.stack(values))
    o = torch.stack(outs).reshape(batch, heads, length, v_dim).transpose(1, 2)
    return o, torch.stack(end_k).reshape(batch, heads, m, d), torch.stack(end_v).reshape(batch, heads, m, v_dim)


def abc(q, k, v, logits):
    """logits (B,T,H,m): slot j = sum_{i<=t} e^{logit_ij} k_i / sum_{i<=t} e^{logit_ij}. -> o (B,T,H,V)."""
    batch, length, heads, _ = q.shape
    outs = []
    for b in range(batch):
        for t in range(length):
            for h in range(heads):
                keys, values = [], []
                for j in range(logits.shape[3]):
                    w = softmax([logits[b, i, h, j] for i in range(t + 1)])
                    keys.append(sum(w[i] * k[b, i, h] for i in range(t + 1)))
                    values.append(sum(w[i] * v[b, i, h] for i in range(t + 1)))
                outs.append(read(q[b, t, h], keys, values))
    return torch.stack(outs).reshape(batch, length, heads, -1)


def layer(x, wq, wk, wv, wf, wo, norm_weight, *, heads, temperature=8.0, eps=1e-5):
    """x (B,T,M); wq, wk (H D,M), wv (H V,M), wf (H m,M) -> y (B,T,M), K~, V~. silu on q, k and v."""
    batch, length, _ = x.shape
    q, k, v, raw = (
        torch.stack([linear(x[b, t], w) for b in range(batch) for t in range(length)]).reshape(batch, length, heads, -1)
        for w in (wq, wk, wv, wf)
    )
    f, s = gates(raw, temperature)
    scale = math.sqrt(q.shape[3])  # theirs has 1, which `read` divides by
    o, end_k, end_v = gsa(scale * silu(q), silu(k), silu(v), s, f)
    outs = []
    for b in range(batch):
        for t in range(length):
            y = silu(o[b, t].reshape(-1))
            outs.append(linear(y / torch.sqrt((y**2).mean() + eps) * norm_weight, wo))
    return torch.stack(outs).reshape(batch, length, -1), end_k, end_v
