"""Collinear attention in loops; its author saw the formulas only, neither code nor tests from here."""

import math

import torch

from naive import linear, may, softmax


def turn(z, position, base=10000.0):
    """Rotary, halves (a, a + D/2)."""
    d = z.shape[0]
    cos = [math.cos(position * base ** (-2 * (a % (d // 2)) / d)) for a in range(d)]
    sin = [math.sin(position * base ** (-2 * (a % (d // 2)) / d)) for a in range(d)]
    return torch.stack([z[a] * cos[a] + (-z[a + d // 2] if a < d // 2 else z[a - d // 2]) * sin[a] for a in range(d)])


def collinear(u):
    """T of one key head: relu of the mean of the halves, copied to both."""
    half = u.shape[0] // 2
    t = torch.relu((u[:half] + u[half:]) / 2)
    return torch.cat([t, t])


def score(q, t, i, j, form="slack", base=10000.0):
    """One query of width D, T of one key, positions i and j (already divided by a linear factor)."""
    if form == "exact":
        s = (turn(q, i, base) * turn(q * t, j, base)).sum()
    else:
        s = (turn(q, i, base) * q * turn(t, j, base)).sum()
    return s / math.sqrt(q.shape[0])


def coca(
    x, wq, wt, wv, wo, heads, form="slack", factor=1.0, allowed=None, causal=True, bq=None, bt=None, bv=None, bo=None
):
    """x (B,T,M) -> out (B,T,M), weights (B,H,T,T). Query head h reads key head h // (H / G)."""
    batch, length, _ = x.shape
    d = wq.shape[0] // heads
    share = heads // (wt.shape[0] // d)
    outs, ws = [], []
    for b in range(batch):
        q, u, v = ([linear(t, w, c) for t in x[b]] for w, c in ((wq, bq), (wt, bt), (wv, bv)))
        for i in range(length):
            parts = []
            for h in range(heads):
                cut = slice(h // share * d, (h // share + 1) * d)
                seen = [j for j in range(length) if may(allowed, b, i, j) and (j <= i or not causal)]
                a = (
                    softmax(
                        [
                            score(q[i][h * d : (h + 1) * d], collinear(u[j][cut]), i / factor, j / factor, form)
                            for j in seen
                        ]
                    )
                    if seen
                    else []
                )
                y, row = torch.zeros(d, dtype=x.dtype), [torch.zeros((), dtype=x.dtype)] * length
                for w, j in zip(a, seen, strict=True):
                    y = y + w * v[j][cut]
                    row[j] = w
                parts.append(y)
                ws.append(torch.stack(row))
            outs.append(linear(torch.cat(parts), wo, bo))
    return (
        torch.stack(outs).reshape(batch, length, -1),
        torch.stack(ws).reshape(batch, length, heads, length).transpose(1, 2),
    )
