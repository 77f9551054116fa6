"""Combiner with the patterns fixed (also bidirectional), logsparse, axial and rowmajor; pools max, mean, sum.

Written from a summary of the paper and its code, by someone who has read neither code nor test of this library.
"""

import torch

from naive import linear, softmax


def plan(i, T, pattern, w=None, causal=True):
    """Direct tokens and regions (lists of tokens) of query i; rowmajor: earlier rows, as tokens of the same column."""
    if pattern == "logsparse":
        regions, c = [], 1
        while c <= i:  # all levels that can be odd: ceil(log2 T) of them are enough (the code has one
            if i // c % 2:  # fewer at T = 2^n + 1)
                end = i // c * c
                regions.append(list(range(end - c, end)))
            c *= 2
        return [i], regions
    b, u = i // w, i % w
    own = [j for j in range(T) if j // w == b and (j <= i or not causal)]
    if pattern == "fixed":
        return own, [list(range(s * w, s * w + w)) for s in range(T // w) if s < b or not causal]
    assert causal
    if pattern == "axial":
        direct = [r * w + u for r in range(b)] + own
        regions = [[r * w + t for r in range(b)] for t in range(w) if t != u and b > 0]
        for r in range(b):
            regions += [x for x in ([r * w + t for t in range(u)], [r * w + t for t in range(u + 1, w)]) if x]
        return direct, regions
    return own, [r * w + u for r in range(b)]  # rowmajor


def pooled(vecs, pool):
    s = torch.stack(vecs)
    return s.max(0).values if pool == "max" else s.mean(0) if pool == "mean" else s.sum(0)


def attend(q, k, v, pattern, w=None, *, pool="max", causal=True):
    """q (already scaled), k, v (T, D), lists or tensors; pattern not rowmajor. Outputs (T, V), weights (T, T)."""
    T = len(q)
    out, eff = [], []
    for i in range(T):
        direct, regions = plan(i, T, pattern, w, causal)
        keys, values, spread = [k[j] for j in direct], [v[j] for j in direct], [{j: 1.0} for j in direct]
        for R in regions:
            f, g = pooled([k[j] for j in R], pool), pooled([q[j] for j in R], pool)
            a = softmax([(g * k[j]).sum() for j in R])
            (
                keys.append(f),
                values.append(sum(a[n] * v[j] for n, j in enumerate(R))),
                spread.append({j: a[n] for n, j in enumerate(R)}),
            )
        p = softmax([(q[i] * f).sum() for f in keys])
        out.append(sum(p[n] * s for n, s in enumerate(values)))
        eff.append(
            torch.stack([sum((p[n] * d[j] for n, d in enumerate(spread) if j in d), 0 * p[0]) for j in range(T)])
        )
    return torch.stack(out), torch.stack(eff)


def combiner(x, Wq, Wk, Wv, Wo, *, pattern="fixed", w=None, pool="max", causal=True, rowmajor=None):
    """x (B, T, M); Wq, Wk, Wv (M, H, D), Wo (H, D, M). rowmajor = (O2 (H, D, M), K2 (M, H, D), ln weight, ln bias).
    T a multiple of w but for logsparse."""
    B, T, _ = x.shape
    H, D = Wq.shape[1:]
    out = []
    for b in range(B):
        q, k, v = (
            [[linear(x[b, t], W[:, h].T) * f for t in range(T)] for h in range(H)]
            for W, f in ((Wq, D**-0.5), (Wk, 1.0), (Wv, 1.0))
        )
        if pattern != "rowmajor":
            heads = [attend(q[h], k[h], v[h], pattern, w, pool=pool, causal=causal)[0] for h in range(H)]
        else:
            O2, K2, lw, lb = rowmajor
            r = []  # plain row attention, not causal inside the row
            for h in range(H):
                r.append([])
                for i in range(T):
                    row = [j for j in range(T) if j // w == i // w]
                    p = softmax([(q[h][i] * k[h][j]).sum() for j in row])
                    r[h].append(sum(p[n] * v[h][j] for n, j in enumerate(row)))
            rk = [[] for _ in range(H)]
            for i in range(T):
                s = x[b, i] + sum(linear(r[h][i], O2[h].T) for h in range(H))
                s = (s - s.mean()) / torch.sqrt(((s - s.mean()) ** 2).mean() + 1e-6) * lw + lb
                for h in range(H):
                    rk[h].append(linear(s, K2[:, h].T))
            heads = []
            for h in range(H):
                rows = []
                for i in range(T):
                    direct, earlier = plan(i, T, pattern, w)
                    p = softmax(
                        [(q[h][i] * k[h][j]).sum() for j in direct] + [(q[h][i] * rk[h][j]).sum() for j in earlier]
                    )
                    rows.append(sum(a * s for a, s in zip(p, [v[h][j] for j in direct] + [r[h][j] for j in earlier])))
                heads.append(torch.stack(rows))
        out.append(torch.stack([sum(linear(heads[h][t], Wo[h].T) for h in range(H)) for t in range(T)]))
    return torch.stack(out)
