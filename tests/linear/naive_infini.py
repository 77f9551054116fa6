"""Naive Infini-attention: local attention with a compressive memory, in loops. Its author has read neither code nor
tests."""

import math

import torch

from naive import linear, softmax


def sigma(z):
    """elu + 1"""
    return torch.where(z > 0, z + 1, torch.exp(torch.clamp(z, max=0)))


def rotate(vec, place, freqs):
    """Interleaved pairs (2i, 2i+1) turned by place * freqs[i]."""
    out = []
    for i in range(len(freqs)):
        c, s = torch.cos(place * freqs[i]), torch.sin(place * freqs[i])
        out += [vec[2 * i] * c - vec[2 * i + 1] * s, vec[2 * i] * s + vec[2 * i + 1] * c]
    return torch.stack(out)


def recall(row, memory, norm):
    """sigma(row) M / (sigma(row) z), the denominator clamped at 1e-10."""
    f = sigma(row)
    return (f[:, None] * memory).sum(0) / torch.clamp((f * norm).sum(), min=1e-10)


def attend(q, k, v, beta, state=None, *, delta=False, freqs=None):
    """One segment. q, k, v (B,H,n,D), beta (H,) -> out (B,H,n,D), (M (B,H,D,V), z (B,H,D)). state None: the first."""
    batch, heads, length, d = q.shape
    outs, memories, norms = [], [], []
    for b in range(batch):
        for h in range(heads):
            memory = q.new_zeros(d, v.shape[3]) if state is None else state[0][b, h]
            norm = q.new_zeros(d) if state is None else state[1][b, h]
            turn = (lambda r, t: r) if freqs is None else (lambda r, t: rotate(r, t, freqs))
            keys = [turn(k[b, h, t], t) for t in range(length)]
            for t in range(length):
                row = turn(q[b, h, t], t)
                a = softmax([(row * keys[j]).sum() / math.sqrt(d) for j in range(t + 1)])
                y = sum(a[j] * v[b, h, j] for j in range(t + 1))
                if state is not None:
                    g = torch.sigmoid(beta[h])
                    y = g * y + (1 - g) * recall(q[b, h, t], memory, norm)
                outs.append(y)
            new, new_norm = memory, norm
            for t in range(length):
                value = v[b, h, t]
                if delta and state is not None:
                    value = value - recall(k[b, h, t], memory, norm)
                new = new + sigma(k[b, h, t])[:, None] * value[None, :]
                new_norm = new_norm + sigma(k[b, h, t])
            memories.append(new)
            norms.append(new_norm)
    out = torch.stack(outs).reshape(batch, heads, length, -1)
    shape = (batch, heads, d, v.shape[3])
    return out, (torch.stack(memories).reshape(shape), torch.stack(norms).reshape(shape[:3]))


def infini(x, gamma, w_qkv, w_out, beta, state=None, *, heads, delta=False, freqs=None):
    """One segment x (B,n,M), with the norm before it -> out (B,n,M), state. w_qkv rows: q, k, v, each by heads."""
    batch, length, dim = x.shape
    qkv = []
    for b in range(batch):
        for t in range(length):
            unit = x[b, t] / torch.clamp(torch.sqrt((x[b, t] ** 2).sum()), min=1e-12)
            qkv.append(linear(unit * math.sqrt(dim) * gamma, w_qkv))
    q, k, v = torch.stack(qkv).reshape(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    o, state = attend(q, k, v, beta, state, delta=delta, freqs=freqs)
    outs = [linear(o[b, :, t].reshape(-1), w_out) for b in range(batch) for t in range(length)]
    return torch.stack(outs).reshape(batch, length, -1), state
