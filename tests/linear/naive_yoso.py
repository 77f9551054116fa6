"""YOSO-E and sampled YOSO by loops, with the gradient of the paper.

Written from the equations alone, by someone who has read neither code nor test of the library.
"""

import math

import torch


def nrm(vec):
    """L2, floored at 1e-12 (a zero vector stays 0 with a finite gradient)."""
    size = float((vec.detach() ** 2).sum()) ** 0.5
    return vec / torch.sqrt((vec**2).sum()) if size > 1e-12 else vec / 1e-12


def collision(x, tau, custom=True):
    """(1 - arccos(x)/pi)^tau; custom: its slope is tau/2 times the value, instead of the true derivative."""
    if not custom:
        return (1 - torch.arccos(torch.clamp(x, -1, 1)) / math.pi) ** tau
    w = (1 - torch.arccos(torch.clamp(x.detach(), -1, 1)) / math.pi) ** tau
    return w + tau / 2 * w * (x - x.detach())


def conv(v, kernel, keep, b, h, t):
    """Depthwise over positions of v * keep, kernel (H,1,K,1), zero padding K // 2."""
    y, size = torch.zeros_like(v[b, h, t]), kernel.shape[2]
    for tap in range(size):
        s = t + tap - size // 2
        if 0 <= s < v.shape[2]:
            y = y + kernel[h, 0, tap, 0] * v[b, h, s] * (1.0 if keep is None else float(keep[b, s]))
    return y


def yoso_e(q, k, v, tau=9, *, keep=None, kernel=None, custom=True):
    """q, k (B,H,T,D), v (B,H,T,V), keep (B,T) for both sides -> out (B,H,T,V), W (B,H,T,T)."""
    batch, heads, length, _ = q.shape
    outs, ws = [], []
    for b in range(batch):
        real = [keep is None or bool(keep[b, t]) for t in range(length)]
        for h in range(heads):
            qh, kh = [nrm(q[b, h, t]) for t in range(length)], [nrm(k[b, h, t]) for t in range(length)]
            for t in range(length):
                y, row = torch.zeros_like(v[b, h, t]), []
                for s in range(length):
                    w = collision((qh[t] * kh[s]).sum(), tau, custom) if real[t] and real[s] else q.new_zeros(())
                    row.append(w)
                    y = y + w * v[b, h, s]
                outs.append(nrm(y) if kernel is None else nrm(y) + conv(v, kernel, keep, b, h, t))
                ws.append(torch.stack(row))
    return torch.stack(outs).reshape(v.shape), torch.stack(ws).reshape(batch, heads, length, length)


def code(vec, planes):
    """sum_j 2^j [vec . r_j > 0]; planes (tau, D)."""
    return sum(2**j for j in range(len(planes)) if float((vec * planes[j]).detach().sum()) > 0)


def yoso_sampled(q, k, v, planes, *, keep=None, kernel=None):
    """planes (B,H,m,tau,D) -> out, Y before its normalisation (the mean of m tables); no gradient to q and k here."""
    batch, heads, length, _ = q.shape
    outs, means = [], []
    for b in range(batch):
        real = [keep is None or bool(keep[b, t]) for t in range(length)]
        for h in range(heads):
            sums = [torch.zeros_like(v[b, h, 0]) for _ in range(length)]
            for hyper in planes[b, h]:
                table = {}
                for s in range(length):
                    if real[s]:
                        c = code(k[b, h, s], hyper)
                        table[c] = table.get(c, 0) + v[b, h, s]
                for t in range(length):
                    if real[t]:
                        sums[t] = sums[t] + table.get(code(q[b, h, t], hyper), 0)
            for t in range(length):
                y = sums[t] / planes.shape[2]
                means.append(y)
                outs.append(nrm(y) if kernel is None else nrm(y) + conv(v, kernel, keep, b, h, t))
    return torch.stack(outs).reshape(v.shape), torch.stack(means).reshape(v.shape)
