"""Efficient Probing written out with loops: one sample, one learned query, one token at a time."""

import math

import torch
from torch import Tensor


def naive_efficient_probing(x: Tensor, q: Tensor, Wv: Tensor, bv: Tensor | None = None) -> Tensor:
    """x (B, N, M), q (Q, M) or (B, Q, M) learned queries, Wv (W, M), bv (W) -> (B, W); W a multiple of Q.

    s[b,j,n] = q_j . x_bn / sqrt(M); a = softmax over n; slice j of the output is
    sum_n a[b,j,n] (Wv x_bn + bv)[slice j].
    """
    B, N, M = x.shape
    Q, W = q.shape[-2], Wv.shape[0]
    c = W // Q
    rows = []
    for b in range(B):
        row = []
        for j in range(Q):
            query = q[b, j] if q.ndim == 3 else q[j]
            scores = torch.stack([torch.dot(query, x[b, n]) / math.sqrt(M) for n in range(N)])
            shifted = (scores - scores.max().detach()).exp()
            total = shifted.sum()
            for channel in range(j * c, (j + 1) * c):
                y = x.new_zeros(())
                for n in range(N):
                    value = torch.dot(Wv[channel], x[b, n])
                    if bv is not None:
                        value = value + bv[channel]
                    y = y + shifted[n] / total * value
                row.append(y)
        rows.append(torch.stack(row))
    return torch.stack(rows)
