"""Geometric attention in loops, from the formulas alone; its author has read neither the code nor a test of it."""

import math

import torch

from naive import linear, softmax


def displacement(box_m, box_n, size_offset=1.0, paper_ratio=False):
    """lambda of query region m and key region n, boxes x0, y0, x1, y1 (eq. 1, 2). paper_ratio: last two inverted."""

    def shape(box):
        x0, y0, x1, y1 = box
        return (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) + size_offset, (y1 - y0) + size_offset

    cx, cy, w, h = shape(box_m)
    dx, dy, wn, hn = shape(box_n)
    sizes = [torch.log(wn / w), torch.log(hn / h)] if paper_ratio else [torch.log(w / wn), torch.log(h / hn)]
    return [
        torch.log(torch.clamp(torch.abs(cx - dx) / w, min=1e-3)),
        torch.log(torch.clamp(torch.abs(cy - dy) / h, min=1e-3)),
    ] + sizes


def embedding(lam, dim=64, wavelength=1000.0, sine=True):
    """Eq. 3."""
    if not sine:
        return torch.stack(lam)
    n = dim // 8
    angles = [100.0 * c * wavelength ** (-f / n) for c in lam for f in range(n)]
    return torch.stack([torch.sin(a) for a in angles] + [torch.cos(a) for a in angles])


def bias(box, wg, bg, floor=1e-6, dim=64, wavelength=1000.0, sine=True, size_offset=1.0, paper_ratio=False):
    """box (B,N,4), wg (H,dim), bg (H) -> log max(g, floor), (B,H,N,N) (eq. 4, 6)."""
    batch, n, _ = box.shape
    out = []
    for b in range(batch):
        emb = [
            [
                embedding(displacement(box[b, i], box[b, j], size_offset, paper_ratio), dim, wavelength, sine)
                for j in range(n)
            ]
            for i in range(n)
        ]
        for h in range(wg.shape[0]):
            for i in range(n):
                for j in range(n):
                    g = torch.relu((wg[h] * emb[i][j]).sum() + bg[h])
                    out.append(torch.log(torch.clamp(g, min=floor)))
    return torch.stack(out).reshape(batch, wg.shape[0], n, n)


def box_attention(x, box, wq, bq, wk, bk, wv, bv, wo, bo, wg, bg, keep=None, penalty=None, **options):
    """x (B,N,M) -> y (B,N,M), weights (B,H,N,N).

    Padded keys (keep False) are left out; with a penalty (-1e9) q.k / sqrt(D) is REPLACED by it and log g still added
    (eq. 5, 6). A row without a key gives zeros before Wo.
    """
    batch, n, m = x.shape
    heads = wg.shape[0]
    d = m // heads
    geo = bias(box, wg, bg, **options)
    outs, ws = [], []
    for b in range(batch):
        q, k, v = ([linear(t, w, c) for t in x[b]] for w, c in ((wq, bq), (wk, bk), (wv, bv)))
        for i in range(n):
            parts = []
            for h in range(heads):
                cut = slice(h * d, (h + 1) * d)
                seen, logits = [], []
                for j in range(n):
                    real = keep is None or bool(keep[b, j])
                    if real or penalty is not None:
                        s = (q[i][cut] * k[j][cut]).sum() / math.sqrt(d) if real else penalty
                        seen.append(j)
                        logits.append(s + geo[b, h, i, j])
                y, row = torch.zeros(d, dtype=x.dtype), [torch.zeros((), dtype=x.dtype)] * n
                for a, j in zip(softmax(logits) if seen else [], seen, strict=True):
                    y = y + a * v[j][cut]
                    row[j] = a
                parts.append(y)
                ws.append(torch.stack(row))
            outs.append(linear(torch.cat(parts), wo, bo))
    return torch.stack(outs).reshape(x.shape), torch.stack(ws).reshape(batch, n, heads, n).transpose(1, 2)


# The paper's form as the account recalls it: size_offset = 0 and paper_ratio = True.
