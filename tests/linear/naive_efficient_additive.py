"""SwiftFormer's efficient additive attention by loops (form l2; ones, the first release; softmax).

Its author has read neither code nor test of the library.
"""

import math

import torch

from naive import linear, softmax


def nrm(vec):
    """L2, floored at 1e-12."""
    return vec / torch.clamp(torch.sqrt((vec**2).sum()), min=1e-12)


def additive(x, wq, bq, wk, bk, w_g, wp, bp, wf, bf, *, heads=1, form="l2", keep=None):
    """x (B,N,M) -> out (B,N,D), alpha (B,N). form: l2 (ii), ones (i), softmax (iii). keep (B,N), true = real.

    Padding is left out of the token norm or softmax and of the sum.
    """
    batch, length, _ = x.shape
    dim = wf.shape[0]
    assert wq.shape[0] == heads * dim
    outs, alphas = [], []
    for b in range(batch):
        real = [n for n in range(length) if keep is None or bool(keep[b, n])]
        q = [nrm(linear(x[b, n], wq, bq)) for n in range(length)]
        k = [nrm(linear(x[b, n], wk, bk)) for n in range(length)]
        a = [(q[n] * w_g[:, 0]).sum() / math.sqrt(dim) for n in real]
        if form == "l2":
            a = list(nrm(torch.stack(a)))
        elif form == "ones":
            a = [torch.ones((), dtype=x.dtype) for _ in real]
        else:
            a = softmax(a)
        g = sum(w * q[n] for w, n in zip(a, real, strict=True))
        row = [torch.zeros((), dtype=x.dtype)] * length
        for w, n in zip(a, real, strict=True):
            row[n] = w
        alphas.append(torch.stack(row))
        outs += [linear(linear(g * k[n], wp, bp) + q[n], wf, bf) for n in range(length)]
    return torch.stack(outs).reshape(batch, length, dim), torch.stack(alphas)


# In the softmax form D^(-1/2) stays before the softmax, which nothing says.
