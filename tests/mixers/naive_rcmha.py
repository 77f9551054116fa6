"""Relative convolutional attention in loops; its author saw a summary only, neither code nor tests from here."""

import math

import torch

from naive import linear, may, softmax


def convolve(rows, kernel, bias):
    """rows: list over time of (D,); kernel (D,K), its last tap on the token itself; zeros before the start."""
    taps = kernel.shape[1]
    out = []
    for t in range(len(rows)):
        y = bias
        for j in range(taps):
            if t - (taps - 1) + j >= 0:
                y = y + kernel[:, j] * rows[t - (taps - 1) + j]
        out.append(y)
    return out


def rcmha(x, wq, wk, wv, bv, wo, bo, convs, u, table, table_bias, memory=None, origin=None, allowed=None):
    """x (B,T,M), memory (B,R,M) or None -> y (B,T,M), weights (B,H,T,R+T).

    convs: {"query" | "key" | "value": (kernel (D,K), bias (D))} or None (plain relative attention).
    table (rows,H,D), table_bias (rows,H): row origin + r for r = key minus query; origin None: half the rows (P).
    """
    batch, length, m = x.shape
    heads, d = u.shape
    past = 0 if memory is None else memory.shape[1]
    zero = table.shape[0] // 2 if origin is None else origin
    outs, ws = [], []
    for b in range(batch):
        here = [x[b, t] for t in range(length)]
        full = ([] if memory is None else [memory[b, t] for t in range(past)]) + here
        q, k, v = [linear(t, wq) for t in here], [linear(t, wk) for t in full], [linear(t, wv, bv) for t in full]
        done = []
        for h in range(heads):
            cut = slice(h * d, (h + 1) * d)
            qh, kh, vh = [t[cut] for t in q], [t[cut] for t in k], [t[cut] for t in v]
            if convs is not None:
                qh, kh, vh = (convolve(r, *convs[n]) for r, n in ((qh, "query"), (kh, "key"), (vh, "value")))
            ys = []
            for i in range(length):
                seen = [j for j in range(past + length) if may(allowed, b, i, j)]
                logits = []
                for j in seen:
                    r = j - (i + past)
                    s = ((qh[i] + u[h]) * kh[j]).sum() + (qh[i] * table[zero + r, h]).sum() + table_bias[zero + r, h]
                    logits.append(s / math.sqrt(d))
                y, row = torch.zeros(d, dtype=x.dtype), [torch.zeros((), dtype=x.dtype)] * (past + length)
                for a, j in zip(softmax(logits) if seen else [], seen, strict=True):
                    y = y + a * vh[j]
                    row[j] = a
                ys.append(y)
                ws.append(torch.stack(row))
            done.append(ys)
        outs += [linear(torch.cat([done[h][i] for h in range(heads)]), wo, bo) for i in range(length)]
    return torch.stack(outs).reshape(batch, length, m), torch.stack(ws).reshape(batch, heads, length, past + length)
