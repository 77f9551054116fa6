"""Linear log-normal attention (LLN) and LLN+Diag, by loops.

Its author has read neither code nor test of the library.
"""

import math

import torch

from naive import softmax

A, B = 0.14855178144710912, -0.35487039130661086


def matched(q, k):
    """alpha, beta from the std of all entries (n - 1), constants without a gradient."""
    stds = []
    for x in (q, k):
        flat = x.detach().reshape(-1).tolist()
        mean = math.fsum(flat) / len(flat)
        stds.append(math.sqrt(math.fsum((e - mean) ** 2 for e in flat) / (len(flat) - 1)))
    sigma = math.sqrt((stds[0] ** 2 * stds[1] ** 2 - B) / (2 * A))
    return sigma / stds[0], sigma / stds[1]


def lln(q, k, v, *, alpha=None, beta=None, causal=False, eps=1e-8):
    """q (B,H,T,D), k (B,H,S,D), v (B,H,S,V) -> out (B,H,T,V). alpha, beta None: moment matching."""
    if alpha is None:
        alpha, beta = matched(q, k)
    batch, heads, length, _ = q.shape
    outs = []
    for b in range(batch):
        for h in range(heads):
            top = (beta * k[b, h]).max()
            phi_k = [torch.exp(beta * k[b, h, s] - top) for s in range(k.shape[2])]
            for t in range(length):
                phi_q = torch.exp(alpha * q[b, h, t] - (alpha * q[b, h, t]).max())
                y, total = torch.zeros(v.shape[3], dtype=q.dtype), torch.zeros((), dtype=q.dtype)
                for s in range(t + 1 if causal else k.shape[2]):
                    w = (phi_q * phi_k[s]).sum()
                    y, total = y + w * v[b, h, s], total + w
                outs.append(y / (total + eps))
    return torch.stack(outs).reshape(batch, heads, length, -1)


def block_diagonal(q, k, v, *, causal=False, size=None):
    """Softmax attention inside consecutive blocks of `size` (default D) tokens, the last one shorter."""
    batch, heads, length, d = q.shape
    size = d if size is None else size
    outs = []
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                start = t // size * size
                seen = range(start, t + 1 if causal else min(start + size, length))
                a = softmax([(q[b, h, t] * k[b, h, s]).sum() / math.sqrt(d) for s in seen])
                outs.append(sum(w * v[b, h, s] for w, s in zip(a, seen, strict=True)))
    return torch.stack(outs).reshape(batch, heads, length, -1)


def lln_diag(q, k, v, *, mix="average", r=None, p=None, causal=False, eps=1e-8, alpha=None, beta=None):
    """mix: average | learnable_scale (r, p) | learnable_ratio (r); r, p (1,H,1,D)."""
    far = lln(q, k, v, alpha=alpha, beta=beta, causal=causal, eps=eps)
    near = block_diagonal(q, k, v, causal=causal)
    if mix == "average":
        return 0.5 * (far + near)
    return r * far + (p if mix == "learnable_scale" else 1 - r) * near
