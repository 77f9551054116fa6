"""Linformer by loops: keys and values projected along the sequence.

Its author has read neither code nor test of the library.
"""

import math

import torch

from naive import linear, softmax


def squeeze(rows, e):
    """Eq. 2: rows list of S vectors (or None for padding), e (S_max, L) -> list of L vectors, k'_l = sum_s E_sl k_s."""
    if len(rows) > e.shape[0]:
        raise ValueError("longer than S_max")
    width = next(r for r in rows if r is not None)
    out = []
    for slot in range(e.shape[1]):
        total = torch.zeros_like(width)
        for s, row in enumerate(rows):
            if row is not None:
                total = total + e[s, slot] * row
        out.append(total)
    return out


def pool(length, rank):
    """The "mean" projection as a matrix (S, L); L must divide S."""
    size = length // rank
    return torch.tensor(
        [[1 / size if s // size == m else 0.0 for m in range(rank)] for s in range(length)], dtype=torch.float64
    )


def linformer(x, wq, wk, wv, wo, bo, e, f, *, heads, context=None, keep=None):
    """x (B,T,M), context (B,S,M); e, f (S_max,L); wk, wv (D or H D, M): one kv head or H. keep (B,S), true = real.

    wv None: v = k; f None: F = E. -> out (B,T,M), weights (B,H,T,L), effective weights A E^T (B,H,T,S) for f = E.
    """
    c = x if context is None else context
    batch, length = x.shape[:2]
    size, d = c.shape[1], wq.shape[0] // heads
    f = e if f is None else f
    outs, ws, eff = [], [], []
    for b in range(batch):
        real = [keep is None or bool(keep[b, s]) for s in range(size)]
        q = [linear(x[b, t], wq) for t in range(length)]
        k = [linear(c[b, s], wk) for s in range(size)]
        v = k if wv is None else [linear(c[b, s], wv) for s in range(size)]
        y = [[] for _ in range(length)]
        for h in range(heads):
            at = h * d if wk.shape[0] == heads * d else 0
            slots_k = squeeze([r[at : at + d] if ok else None for r, ok in zip(k, real, strict=True)], e)
            slots_v = squeeze([r[at : at + d] if ok else None for r, ok in zip(v, real, strict=True)], f)
            for t in range(length):
                a = softmax([(q[t][h * d : (h + 1) * d] * key).sum() / math.sqrt(d) for key in slots_k])
                y[t].append(sum(w * val for w, val in zip(a, slots_v, strict=True)))
                ws.append(torch.stack(a))
                eff.append(torch.stack([sum(w * f[s, m] for m, w in enumerate(a)) * real[s] for s in range(size)]))
        outs += [linear(torch.cat(parts), wo, bo) for parts in y]
    shape = (batch, heads, length, -1)
    return torch.stack(outs).reshape(batch, length, -1), torch.stack(ws).reshape(shape), torch.stack(eff).reshape(shape)
