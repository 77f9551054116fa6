"""Multi-window attention in loops; the author saw the formulas only, neither code nor tests."""

import math

import torch

from naive import linear, softmax


def allowed(windows, length):
    """-> bool (H,N,N), unshifted form; 0 = global."""
    return torch.tensor([[[w == 0 or i // w == j // w for j in range(length)] for i in range(length)] for w in windows])


def multi_window(x, wqkv, bqkv, wo, bo, windows, tables=None, shift=False, penalty=-100.0):
    """x (B,N,M), windows one int a head, tables[h] (2w-1) or None -> out (B,N,M), weights (B,H,N,N).

    shift: windows are cut after rolling by -(w // 2); in the last window pairs from different ends get `penalty`
    (None: they are left out).
    """
    batch, n, m = x.shape
    heads = len(windows)
    d = m // heads
    outs, ws = [], []
    for b in range(batch):
        qkv = [linear(x[b, i], wqkv, bqkv) for i in range(n)]
        for i in range(n):
            parts = []
            for h, w in enumerate(windows):
                s = w // 2 if shift and w > 0 else 0
                pi = (i - s) % n  # place after the roll
                seen, logits = [], []
                for j in range(n):
                    pj = (j - s) % n
                    if w > 0 and pi // w != pj // w:
                        continue
                    ends = (i < s) != (j < s)  # s > 0: only the last window holds tokens of both ends
                    if w > 0 and ends and penalty is None:
                        continue
                    z = (qkv[i][h * d : (h + 1) * d] * qkv[j][m + h * d : m + (h + 1) * d]).sum() / math.sqrt(d)
                    if w > 0 and tables is not None:
                        z = z + tables[h][(pi - pj) + w - 1]
                    if w > 0 and ends:
                        z = z + penalty
                    seen.append(j)
                    logits.append(z)
                y, row = 0, [torch.zeros((), dtype=x.dtype)] * n
                for a, j in zip(softmax(logits), seen, strict=True):
                    y = y + a * qkv[j][2 * m + h * d : 2 * m + (h + 1) * d]
                    row[j] = a
                parts.append(y)
                ws.append(torch.stack(row))
            outs.append(linear(torch.cat(parts), wo, bo))
    return torch.stack(outs).reshape(x.shape), torch.stack(ws).reshape(batch, n, heads, n).transpose(1, 2)
