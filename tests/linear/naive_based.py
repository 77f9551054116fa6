"""Naive Based: the second-order Taylor feature map, in loops. Its author has read neither code nor tests."""

import math

import torch


def taylor2(x):
    """x (D,) -> [1, x, vec(x x^T)/sqrt(2)], width 1 + D + D^2."""
    out = [torch.ones((), dtype=x.dtype)] + [x[i] for i in range(len(x))]
    out += [x[i] * x[j] / math.sqrt(2) for i in range(len(x)) for j in range(len(x))]
    return torch.stack(out)


def taylor2_half(x):
    """The symmetric half: width 1 + D + D (D + 1) / 2, the same inner products."""
    out = [torch.ones((), dtype=x.dtype)] + [x[i] for i in range(len(x))]
    for i in range(len(x)):
        out += [x[i] * x[j] * (1 if i < j else 1 / math.sqrt(2)) for j in range(i, len(x))]
    return torch.stack(out)


def based(q, k, v, *, eps=1e-6, normalise=True):
    """q, k (B,H,T,D), v (B,H,T,V) -> out (B,H,T,V), raw weights w_ij = 1 + s + s^2/2 (B,H,T,T)."""
    batch, heads, length, d = q.shape
    outs, ws = [], []
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                row = [torch.zeros((), dtype=q.dtype)] * length
                y, total = torch.zeros(v.shape[3], dtype=q.dtype), torch.zeros((), dtype=q.dtype)
                for j in range(i + 1):
                    s = (q[b, h, i] * k[b, h, j]).sum() / math.sqrt(d)
                    row[j] = 1 + s + s**2 / 2
                    y, total = y + row[j] * v[b, h, j], total + row[j]
                outs.append(y / (total + eps) if normalise else y)
                ws.append(torch.stack(row))
    return torch.stack(outs).reshape(batch, heads, length, -1), torch.stack(ws).reshape(batch, heads, length, length)


def based_recurrent(q, k, v, *, eps=1e-6, normalise=True, feature=taylor2, state=None):
    """By the feature map -> out (B,H,T,V), state (B,H,F,V+1), the last column the sum of phi(k)."""
    batch, heads, length, d = q.shape
    outs, ends = [], []
    for b in range(batch):
        for h in range(heads):
            s = 0.0 if state is None else state[b, h]
            for t in range(length):
                s = s + feature(k[b, h, t])[:, None] * torch.cat([v[b, h, t], v.new_ones(1)])[None, :]
                y = (feature(q[b, h, t] / math.sqrt(d))[:, None] * s).sum(0)
                outs.append(y[:-1] / (y[-1] + eps) if normalise else y[:-1])
            ends.append(s)
    return torch.stack(outs).reshape(batch, heads, length, -1), torch.stack(ends).reshape(
        batch, heads, -1, v.shape[3] + 1
    )
