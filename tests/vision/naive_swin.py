"""Attention in many short windows, and Swin's layer with its shift, regions and bias table, in loops.

Written from the equations alone, by someone who has read neither code nor test of the library.
"""

import torch

from naive import linear, softmax


def window_kernel(q, k, v, bias=None, mask=None, scale=None):
    """q, k, v (Bw, H, N, D), bias (H, N, N), mask (nW, N, N) of numbers added after
    the bias, window w = batch index mod nW."""
    Bw, H, N, D = q.shape
    scale = D**-0.5 if scale is None else scale
    out = []
    for b in range(Bw):
        for h in range(H):
            for i in range(N):
                z = []
                for j in range(N):
                    a = scale * (q[b, h, i] * k[b, h, j]).sum()
                    if bias is not None:
                        a = a + bias[h, i, j]
                    if mask is not None:
                        a = a + mask[b % mask.shape[0], i, j]
                    z.append(a)
                p = softmax(z)
                out.append(sum(p[j] * v[b, h, j] for j in range(N)))
    return torch.stack(out).view(Bw, H, N, v.shape[-1])


def region(p, L, w, s):
    """0, 1, 2 for [0, L-w), [L-w, L-s), [L-s, L) of the rolled coordinate p."""
    return 0 if p < L - w else 1 if p < L - s else 2


def shifted_window(x, Wqkv, bqkv, Wo, bo, table, *, heads, window, shift=0, mask_value=-100.0):
    """x (B, Y, X, C) -> same; table ((2w-1)^2, H). mask_value -100 as timm (it leaks at large scores), float("-inf") is
    clean, 0 is the official flash path, which drops the mask. Sides must be multiples of the window.
    A side not larger than the window: timm takes window = side, shift = 0; pass these yourself (it does not say
    whether per axis or for both, nor what becomes of the table: here window is one number)."""
    B, Y, X, C = x.shape
    w, s, D = window, shift, C // heads
    assert Y % w == 0
    assert X % w == 0
    tok = [(y, c) for y in range(Y) for c in range(X)]  # place after the roll by (-s, -s)
    out = []
    for b in range(B):
        f = {(y, c): linear(x[b, (y + s) % Y, (c + s) % X], Wqkv, bqkv) for y, c in tok}
        o = {}
        for y, c in tok:
            seen = [(u, t) for u, t in tok if u // w == y // w and t // w == c // w]
            parts = []
            for h in range(heads):
                q, k, v = (slice(n * C + h * D, n * C + (h + 1) * D) for n in range(3))
                z = []
                for u, t in seen:
                    a = (
                        D**-0.5 * (f[y, c][q] * f[u, t][k]).sum()
                        + table[(y - u + w - 1) * (2 * w - 1) + c - t + w - 1, h]
                    )
                    if s and (region(y, Y, w, s), region(c, X, w, s)) != (region(u, Y, w, s), region(t, X, w, s)):
                        a = a + mask_value
                    z.append(a)
                p = softmax(z)
                parts.append(sum(p[n] * f[at][v] for n, at in enumerate(seen)))
            o[y, c] = linear(torch.cat(parts), Wo, bo)
        out.append(torch.stack([torch.stack([o[(y - s) % Y, (c - s) % X] for c in range(X)]) for y in range(Y)]))
    return torch.stack(out)
