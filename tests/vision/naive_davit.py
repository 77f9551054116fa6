"""DaViT's two attentions (arXiv 2204.03645), written out: windows of pixels, and groups of channels."""

import torch
from torch import Tensor


def naive_davit_channels(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Channel group attention. a, b, c (B, N, G, C) -> (B, N, G, C).

    A_g[i, j] = softmax_j(C^-1/2 sum_n b[n, g, i] c[n, g, j]) and out[n, g, i] = sum_j A_g[i, j] a[n, g, j].
    In the usual naming Q = b, K = c, V = a (the authors' code cuts the projection in the order a, b, c).
    """
    B, N, G, C = a.shape
    out = torch.zeros_like(a)
    for batch in range(B):
        for g in range(G):
            for i in range(C):
                logits = [torch.einsum("n,n->", b[batch, :, g, i], c[batch, :, g, j]) * C**-0.5 for j in range(C)]
                largest = max(one.item() for one in logits)
                e = [torch.exp(z - largest) for z in logits]
                for n in range(N):
                    out[batch, n, g, i] = sum(e[j] / sum(e) * a[batch, n, g, j] for j in range(C))
    return out


def naive_davit_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention inside windows that do not overlap. q, k, v (B, H, Y, X, D) -> (B, H, Y, X, D); scale D^-1/2.

    Y and X must be multiples of `window`: the paper's code pads the tokens with zeros on the right and below before
    the projections (so that padded keys equal the projection's bias and take part) and cuts the result.
    """
    B, H, Y, X, D = q.shape
    if Y % window or X % window:
        raise ValueError("pad first")
    out = torch.zeros_like(v)
    for b in range(B):
        for h in range(H):
            for y in range(Y):
                for x in range(X):
                    top, left = y // window * window, x // window * window
                    keys = [(yy, xx) for yy in range(top, top + window) for xx in range(left, left + window)]
                    logits = [torch.einsum("d,d->", q[b, h, y, x], k[b, h, yy, xx]) * D**-0.5 for yy, xx in keys]
                    largest = max(one.item() for one in logits)
                    e = [torch.exp(z - largest) for z in logits]
                    out[b, h, y, x] = sum(one / sum(e) * v[b, h, *key] for one, key in zip(e, keys, strict=True))
    return out
