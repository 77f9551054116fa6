"""xPos and blockwise causal attention in loops; its author saw the formulas only, neither code nor tests from here."""

import math

import torch

from naive import linear, may, softmax


def xpos(z, angle_position, exponent, base=512.0, gamma=0.4, down=False):
    """One vector of width D (pairs 2a, 2a+1). base None: no scale (rotary alone). down: for keys."""
    d = z.shape[0]
    out = []
    for a in range(d // 2):
        th = angle_position * 10000.0 ** (-2 * a / d)
        zeta = (2 * a / d + gamma) / (1 + gamma)
        scale = 1.0 if base is None else zeta ** ((-exponent if down else exponent) / base)
        x, y = z[2 * a], z[2 * a + 1]
        out += [(x * math.cos(th) - y * math.sin(th)) * scale, (y * math.cos(th) + x * math.sin(th)) * scale]
    return torch.stack(out)


def sees(i, j, train_length=None):
    """Causal; with a training length l blockwise: blocks of l // 2, own block and the one before."""
    if j > i:
        return False
    return train_length is None or j // (train_length // 2) in (i // (train_length // 2) - 1, i // (train_length // 2))


def attend(q, k, v, base=512.0, gamma=0.4, train_length=None, allowed=None, past=0, centre=True):
    """q (B,H,T,D), k (B,H,S,D), v (B,H,S,V), raw; query t is position past + t -> out (B,H,T,V), weights (B,H,T,S)."""
    batch, heads, length, d = q.shape
    total = k.shape[2]
    mid = math.floor(-total / 2) if centre else 0  # any common origin is right
    outs, ws = [], []
    for b in range(batch):
        for h in range(heads):
            turned = [xpos(k[b, h, j], j, j + mid, base, gamma, down=True) for j in range(total)]
            for t in range(length):
                i = past + t
                query = xpos(q[b, h, t], i, i + mid, base, gamma)
                seen = [j for j in range(total) if sees(i, j, train_length) and may(allowed, b, t, j)]
                row, y = [torch.zeros((), dtype=q.dtype)] * total, torch.zeros(v.shape[3], dtype=q.dtype)
                for w, j in zip(
                    softmax([(query * turned[j]).sum() / math.sqrt(d) for j in seen]) if seen else [], seen
                ):
                    row[j] = w
                    y = y + w * v[b, h, j]
                outs.append(y)
                ws.append(torch.stack(row))
    return torch.stack(outs).reshape(batch, heads, length, -1), torch.stack(ws).reshape(batch, heads, length, total)


def layer(x, wq, bq, wk, bk, wv, bv, wo, bo, heads, **options):
    """x (B,T,M) -> (B,T,M)."""
    batch, length, _ = x.shape
    q, k, v = (
        torch.stack([torch.stack([linear(t, w, c) for t in row]) for row in x])
        .reshape(batch, length, heads, -1)
        .transpose(1, 2)
        for w, c in ((wq, bq), (wk, bk), (wv, bv))
    )
    y, _ = attend(q, k, v, **options)
    return torch.stack(
        [
            torch.stack([linear(torch.cat([y[b, h, t] for h in range(heads)]), wo, bo) for t in range(length)])
            for b in range(batch)
        ]
    )
