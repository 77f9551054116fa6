"""HGRN and HGRN2 in loops, token by token.

Written from the equations alone, by someone who has read neither code nor test of the library.
"""

import math

import torch


def linear(x, weight, bias=None):
    y = torch.stack([(row * x).sum() for row in weight])
    return y if bias is None else y + bias


def softmax(z):
    top = max(float(one.detach()) for one in z)
    e = [torch.exp(one - top) for one in z]
    return [one / sum(e) for one in e]


def silu(z):
    return z * torch.sigmoid(z)


def rms(vec, weight, eps):
    return vec / torch.sqrt((vec**2).mean() + eps) * weight


def bounds(logits):
    """logits (layers, C) -> gamma (layers, C): softmax over layers, cumulated, minus the first."""
    columns = [torch.stack(softmax([logits[layer, c] for layer in range(len(logits))])) for c in range(logits.shape[1])]
    table = torch.stack(columns, 1)
    return torch.stack([table[: layer + 1].sum(0) - table[0] for layer in range(len(logits))])


def forget(raw, gamma=None):
    f = torch.sigmoid(raw)
    return f if gamma is None else gamma + (1 - gamma) * f


def recurrence(x, log_decay, state=None):
    """h_t = exp(log_decay_t) h_{t-1} + x_t. x, log_decay (B,T,I) -> h (B,T,I), last h (B,I)."""
    outs, ends = [], []
    for b in range(x.shape[0]):
        h = torch.zeros_like(x[b, 0]) if state is None else state[b]
        for t in range(x.shape[1]):
            h = torch.exp(log_decay[b, t]) * h + x[b, t]
            outs.append(h)
        ends.append(h)
    return torch.stack(outs).reshape(x.shape), torch.stack(ends)


def hgrn(x, wi, wf, wg, wo, norm_weight, gamma=None, eps=1e-5, state=None):
    """x (B,T,M), gamma (I,) or None in layer 0 -> y (B,T,M), last h (B,I)."""
    outs, ends = [], []
    for b in range(x.shape[0]):
        h = torch.zeros(wi.shape[0], dtype=x.dtype) if state is None else state[b]
        for t in range(x.shape[1]):
            f = forget(linear(x[b, t], wf), gamma)
            h = f * h + (1 - f) * silu(linear(x[b, t], wi))
            outs.append(linear(rms(h, norm_weight, eps) * silu(linear(x[b, t], wg)), wo))
        ends.append(h)
    return torch.stack(outs).reshape(x.shape[0], x.shape[1], -1), torch.stack(ends)


def hgrn2(x, wq, wf, wi, wo, norm_weight, *, heads, gamma=None, eps=1e-5, scale=None, state=None):
    """wq, wf (H D, M), wi (H V, M) -> y (B,T,M), state (B,H,D,V). scale None: D^(-1/2)."""
    d, v_dim = wq.shape[0] // heads, wi.shape[0] // heads
    scale = 1 / math.sqrt(d) if scale is None else scale
    outs, ends = [], []
    for b in range(x.shape[0]):
        s = [torch.zeros(d, v_dim, dtype=x.dtype) if state is None else state[b, h] for h in range(heads)]
        for t in range(x.shape[1]):
            q, v = silu(linear(x[b, t], wq)), linear(x[b, t], wi)
            f = forget(linear(x[b, t], wf), gamma)
            parts = []
            for h in range(heads):
                fh, qh, vh = f[h * d : (h + 1) * d], q[h * d : (h + 1) * d], v[h * v_dim : (h + 1) * v_dim]
                s[h] = fh[:, None] * s[h] + (1 - fh)[:, None] * vh[None, :]
                parts.append((scale * qh[:, None] * s[h]).sum(0))
            outs.append(linear(rms(torch.cat(parts), norm_weight, eps), wo))
        ends.append(torch.stack(s))
    return torch.stack(outs).reshape(x.shape[0], x.shape[1], -1), torch.stack(ends)
