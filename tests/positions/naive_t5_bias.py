"""T5's bucketed bias in loops: written from the equations by somebody who saw neither the code nor the tests."""

import math

import torch

from naive import linear, may, softmax


def bucket(r, buckets=32, max_distance=128, bidirectional=True):
    """Of r = j - i (key minus query)."""
    n = buckets // 2 if bidirectional else buckets
    offset = n if bidirectional and r > 0 else 0
    d = abs(r) if bidirectional else max(-r, 0)
    e = n // 2
    if d < e:
        return offset + d
    return offset + min(e + math.floor(math.log(d / e) / math.log(max_distance / e) * (n - e)), n - 1)


def bias(table, queries, keys, max_distance=128, bidirectional=True, past=0):
    """table (buckets, H) -> (H, T, S); query t stands at past + t."""
    n, heads = table.shape
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack([table[bucket(j - (past + t), n, max_distance, bidirectional), h] for j in range(keys)])
                    for t in range(queries)
                ]
            )
            for h in range(heads)
        ]
    )


def attention(x, wq, wk, wv, wo, table, max_distance=128, bidirectional=True, allowed=None, scale=1.0):
    """x (B,T,M) -> out (B,T,M), weights (B,H,T,T)."""
    batch, length, _ = x.shape
    heads = table.shape[1]
    d = wq.shape[0] // heads
    extra = bias(table, length, length, max_distance, bidirectional)
    outs, ws = [], []
    for b in range(batch):
        q, k, v = ([linear(x[b, i], w) for i in range(length)] for w in (wq, wk, wv))
        for i in range(length):
            parts = []
            for h in range(heads):
                cut = slice(h * d, (h + 1) * d)
                seen = [j for j in range(length) if may(allowed, b, i, j) and (bidirectional or j <= i)]
                a = softmax([(q[i][cut] * k[j][cut]).sum() * scale + extra[h, i, j] for j in seen])
                parts.append(sum(w * v[j][cut] for w, j in zip(a, seen)))
                row = [torch.zeros((), dtype=x.dtype)] * length
                for w, j in zip(a, seen):
                    row[j] = w
                ws.append(torch.stack(row))
            outs.append(linear(torch.cat(parts), wo))
    return (
        torch.stack(outs).reshape(batch, length, -1),
        torch.stack(ws).reshape(batch, length, heads, length).transpose(1, 2),
    )
