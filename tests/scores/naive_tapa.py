"""Token-aware phase attention in loops; its author saw the formulas only, neither code nor tests from here."""

import math

import torch

from naive import may, softmax


def score(q, k, distance, alpha=0.1, theta=0.5, phase="quadratic"):
    """One pair, q and k of width D: the first theta*D coordinates are the amplitude."""
    d = q.shape[0]
    da = round(theta * d)
    dp = d - da
    amp, f = 0, 0
    for c in range(da):
        amp = amp + q[c] * k[c] / math.sqrt(da)
    for c in range(da, d):
        if phase == "quadratic":
            f = f + q[c] * k[c] / math.sqrt(dp)
        else:  # "linear"; over the phase parts: the account calls this inferred
            f = f + (q[c] + k[c]) / math.sqrt(dp)
    far = 0.0 if distance == 0 else distance**alpha
    return amp * torch.cos(2 * math.pi * far * f)


def tapa(q, k, v, alpha=0.1, theta=0.5, phase="quadratic", causal=True, allowed=None):
    """q (B,H,T,D), k (B,G,S,D), v (B,G,S,V) -> out (B,H,T,V), weights (B,H,T,S); queries are the last T positions.

    Query head h reads key head h // (H / G). A query without an allowed key gives zeros.
    """
    batch, heads, length, _ = q.shape
    groups, keys = k.shape[1], k.shape[2]
    outs, ws = [], []
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for t in range(length):
                m = t + keys - length
                seen = [n for n in range(keys) if may(allowed, b, t, n) and (n <= m or not causal)]
                row, y = [torch.zeros((), dtype=q.dtype)] * keys, torch.zeros(v.shape[3], dtype=q.dtype)
                a = (
                    softmax([score(q[b, h, t], k[b, g, n], abs(m - n), alpha, theta, phase) for n in seen])
                    if seen
                    else []
                )
                for w, n in zip(a, seen, strict=True):
                    row[n] = w
                    y = y + w * v[b, g, n]
                outs.append(y)
                ws.append(torch.stack(row))
    return (torch.stack(outs).reshape(batch, heads, length, -1), torch.stack(ws).reshape(batch, heads, length, keys))
