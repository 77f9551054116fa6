"""Sliding window and global tokens with projections of their own, dilation per head and the shared form, in loops.

Written from the equations alone, by someone who has read neither code nor test of the library.
"""

import torch

from naive import linear, softmax


def allowed(T, window, is_global, padded=None, dilation=1):
    """(T, T) bool of one sample, rows of padded queries empty. is_global, padded (T)."""
    a = torch.zeros(T, T, dtype=torch.bool)
    r = window // 2
    for i in range(T):
        for j in range(T):
            near = abs(i - j) <= r * dilation and (i - j) % dilation == 0
            ok = bool(is_global[i]) or bool(is_global[j]) or near
            if padded is not None and (bool(padded[i]) or bool(padded[j])):
                ok = False
            a[i, j] = ok
    return a


def longformer(x, local, glob, *, heads, window, is_global, padded=None, dilation=None, Wo=None, bo=None):
    """x (B, T, M). local, glob = (Wq, bq, Wk, bk, Wv, bv); glob None shares the local maps. is_global, padded (B, T).
    dilation: list per head. Returns (B, T, M), before the output map unless Wo is given (then a padded row is bo)."""
    B, T, M = x.shape
    D = M // heads
    glob = local if glob is None else glob
    out = []
    for b in range(B):
        pad = None if padded is None else padded[b]
        assert pad is None or not any(bool(pad[t]) and bool(is_global[b][t]) for t in range(T))
        q, k, v = ([linear(x[b, t], local[c], local[c + 1]) for t in range(T)] for c in (0, 2, 4))
        qg, kg, vg = ([linear(x[b, t], glob[c], glob[c + 1]) for t in range(T)] for c in (0, 2, 4))
        masks = [allowed(T, window, is_global[b], pad, 1 if dilation is None else dilation[h]) for h in range(heads)]
        rows = []
        for i in range(T):
            Q, K, V = (qg, kg, vg) if bool(is_global[b][i]) else (q, k, v)
            parts = []
            for h in range(heads):
                s = slice(h * D, (h + 1) * D)
                seen = [j for j in range(T) if masks[h][i, j]]
                if not seen:  # padded query
                    parts.append(x.new_zeros(D))
                    continue
                p = softmax([(Q[i][s] / D**0.5 * K[j][s]).sum() for j in seen])
                parts.append(sum(w * V[j][s] for w, j in zip(p, seen)))
            o = torch.cat(parts)
            rows.append(o if Wo is None else linear(o, Wo, bo))
        out.append(torch.stack(rows))
    return torch.stack(out)
