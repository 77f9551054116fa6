"""Skim-Attention in loops, from the formulas alone; its author has read neither the code nor a test of it."""

import math

import torch

from naive import linear, softmax


def norm(x, weight, bias, eps=1e-12):
    mean = x.sum() / x.shape[0]
    return (x - mean) / torch.sqrt(((x - mean) ** 2).sum() / x.shape[0] + eps) * weight + bias


def layout(box, ex, ey, eh, ew, ln_w, ln_b, centre=False):
    """box (B,T,4) integers x0, y0, x1, y1 -> (B,T,L); centre: the degraded variant."""
    rows = []
    for doc in box.tolist():
        for x0, y0, x1, y1 in doc:
            if centre:
                rows.append(norm(ex[(x0 + x1) // 2] + ey[(y0 + y1) // 2], ln_w, ln_b))
            else:
                rows.append(norm(ex[x0] + ex[x1] + ey[y0] + ey[y1] + eh[y1 - y0] + ew[x1 - x0], ln_w, ln_b))
    return torch.stack(rows).reshape(box.shape[0], box.shape[1], -1)


def skim_weights(lay, wq, bq, wk, bk, heads, keep=None, penalty=-10000.0):
    """lay (B,T,L) -> A (B,H,T,T). penalty None: padded keys are left out altogether (a row of them only: zeros)."""
    batch, length, _ = lay.shape
    d = wq.shape[0] // heads
    out = []
    for b in range(batch):
        q = [linear(lay[b, i], wq, bq) for i in range(length)]
        k = [linear(lay[b, i], wk, bk) for i in range(length)]
        for h in range(heads):
            cut = slice(h * d, (h + 1) * d)
            for i in range(length):
                seen, logits = [], []
                for j in range(length):
                    real = keep is None or bool(keep[b, j])
                    if real or penalty is not None:
                        seen.append(j)
                        logits.append((q[i][cut] * k[j][cut]).sum() / math.sqrt(d) + (0.0 if real else penalty))
                row = [torch.zeros((), dtype=lay.dtype)] * length
                for a, j in zip(softmax(logits) if seen else [], seen, strict=True):
                    row[j] = a
                out.append(torch.stack(row))
    return torch.stack(out).reshape(batch, heads, length, length)


def sublayer(z, a, wv, bv, wo, bo, ln_w, ln_b):
    """LN(Wo concat_h(A_h (Wv z)) + z) for z (B,T,M) and given weights A (B,H,T,T)."""
    batch, length, _ = z.shape
    heads = a.shape[1]
    d = wv.shape[0] // heads
    rows = []
    for b in range(batch):
        v = [linear(z[b, j], wv, bv) for j in range(length)]
        for i in range(length):
            c = torch.cat([sum(a[b, h, i, j] * v[j][h * d : (h + 1) * d] for j in range(length)) for h in range(heads)])
            rows.append(norm(linear(c, wo, bo) + z[b, i], ln_w, ln_b))
    return torch.stack(rows).reshape(z.shape)


def feed_forward(z, w1, b1, w2, b2, ln_w, ln_b):
    """LN(FF(z) + z), FF a GELU MLP (exact GELU assumed, as in BERT; no golden numbers)."""
    rows = [
        norm(linear(torch.nn.functional.gelu(linear(r, w1, b1)), w2, b2) + r, ln_w, ln_b)
        for r in z.reshape(-1, z.shape[-1])
    ]
    return torch.stack(rows).reshape(z.shape)


def skimming_mask(a, k, keep=None):
    """A (B,H,T,T) -> bool (B,H,T,T): the k largest keys of each row and head, times the padding mask of the keys."""
    out = torch.zeros(a.shape, dtype=torch.bool)
    for b in range(a.shape[0]):
        for h in range(a.shape[1]):
            for i in range(a.shape[2]):
                row = a[b, h, i].tolist()
                for j in sorted(range(len(row)), key=lambda j: -row[j])[:k]:
                    out[b, h, i, j] = keep is None or bool(keep[b, j])
    return out
