"""B092, MASFormer, mixed attention spans: equations 1, 2 (block form and window form), cost and reach, by counting.

Written from the formulas alone, by someone who has read neither code nor test of the library. Doubt: how span and block
belong together; here the block form takes `span` as its block, and `previous` blocks, 1 by default.
"""

import torch

from naive import softmax


def allowed(T, span, form="block", previous=1):
    """(T, T) bool of a sparse layer; form "block", "window" or "full" (causal)."""
    a = torch.zeros(T, T, dtype=torch.bool)
    for i in range(T):
        for j in range(T):
            if form == "window":
                ok = 0 <= i - j < span
            elif form == "block":
                ok = j <= i and i // span - j // span <= previous
            else:
                ok = j <= i
            a[i, j] = ok
    return a


def masks(T, depth, full, span, form="block", previous=1):
    """List of depth masks; layers in `full` (indices from 0) are causal over everything."""
    return [allowed(T, span, "full" if l in full else form, previous) for l in range(depth)]


def bottom(depth, count):
    """The default placement."""
    return tuple(range(min(count, depth)))


def attention(q, k, v, mask):
    """q, k, v (B, H, T, D) under one layer's mask (T, T)."""
    B, H, T, D = q.shape
    out = []
    for b in range(B):
        for h in range(H):
            for i in range(T):
                seen = [j for j in range(T) if mask[i, j]]
                p = softmax([(q[b, h, i] * k[b, h, j]).sum() / D**0.5 for j in seen])
                out.append(sum(p[n] * v[b, h, j] for n, j in enumerate(seen)))
    return torch.stack(out).view(B, H, T, -1)


def reach(layer_masks):
    """(T, T) bool: can the output of the stack at i depend on the input at j (residuals and attention)?"""
    T = len(layer_masks[0])
    r = torch.eye(T, dtype=torch.bool)
    for m in layer_masks:
        r = torch.tensor(
            [
                [bool(r[i, j]) or any(bool(m[i, t]) and bool(r[t, j]) for t in range(T)) for j in range(T)]
                for i in range(T)
            ]
        )
    return r


def cost(layer_masks):
    """Seen pairs of the stack over those of causal attention in every layer."""
    T = len(layer_masks[0])
    return sum(int(m.sum()) for m in layer_masks) / (len(layer_masks) * T * (T + 1) // 2)


def cache(T, depth, full, span):
    """Entries kept by the layers while decoding, window form: full layers T, others the window."""
    return sum(T if l in full else min(span, T) for l in range(depth))
