"""RWKV-4 (time mix, channel mix) and the kernel of RWKV-6 in loops, token by token.

Written from the equations alone, by someone who has read neither code nor test of the library.
"""

import math

import torch

from naive import linear


def mix(x, last, m):
    return m * x + (1 - m) * last


def wkv(k, v, w, u):
    """k, v (B,T,A), w = exp(time_decay) > 0 (A,), u (A,) -> (B,T,A), per channel a softmax."""
    batch, length, width = k.shape
    outs = []
    for b in range(batch):
        for t in range(length):
            for c in range(width):
                logits = [k[b, j, c] - (t - 1 - j) * w[c] for j in range(t)] + [k[b, t, c] + u[c]]
                top = max(float(z.detach()) for z in logits)
                e = [torch.exp(z - top) for z in logits]
                outs.append(sum(a * v[b, j, c] for j, a in enumerate(e)) / sum(e))
    return torch.stack(outs).reshape(k.shape)


def wkv_recurrent(k, v, w, u, state=None):
    """The same with (numerator, denominator, running maximum), each (B,A) -> out, state; the maximum begins -1e38."""
    if state is None:
        zero = torch.zeros_like(k[:, 0])
        state = (zero, zero, zero - 1e38)
    num, den, top = state
    outs = []
    for t in range(k.shape[1]):
        own = torch.maximum(top, k[:, t] + u)
        a, b = torch.exp(top - own), torch.exp(k[:, t] + u - own)
        outs.append((a * num + b * v[:, t]) / (a * den + b))
        new = torch.maximum(top - w, k[:, t])
        a, b = torch.exp(top - w - new), torch.exp(k[:, t] - new)
        num, den, top = a * num + b * v[:, t], a * den + b, new
    return torch.stack(outs, 1), (num, den, top)


def time_mix(x, p, last=None):
    """x (B,T,M), last (B,M) the token before -> out (B,T,M), and the last input."""
    batch, length, dim = x.shape
    ks, vs, rs = [], [], []
    m = {n: p["time_mix_" + n].reshape(-1) for n in ("key", "value", "receptance")}
    for b in range(batch):
        old = x.new_zeros(dim) if last is None else last[b]
        for t in range(length):
            ks.append(linear(mix(x[b, t], old, m["key"]), p["key.weight"]))
            vs.append(linear(mix(x[b, t], old, m["value"]), p["value.weight"]))
            rs.append(torch.sigmoid(linear(mix(x[b, t], old, m["receptance"]), p["receptance.weight"])))
            old = x[b, t]
    k, v, r = (torch.stack(a).reshape(batch, length, -1) for a in (ks, vs, rs))
    y = r * wkv(k, v, torch.exp(p["time_decay"]), p["time_first"])
    outs = [linear(y[b, t], p["output.weight"]) for b in range(batch) for t in range(length)]
    return torch.stack(outs).reshape(batch, length, -1), x[:, -1]


def channel_mix(x, p, last=None):
    """x (B,T,M) -> y (B,T,M), and the last input."""
    batch, length, dim = x.shape
    outs = []
    for b in range(batch):
        old = x.new_zeros(dim) if last is None else last[b]
        for t in range(length):
            k = torch.clamp(linear(mix(x[b, t], old, p["time_mix_key"].reshape(-1)), p["key.weight"]), min=0) ** 2
            r = torch.sigmoid(linear(mix(x[b, t], old, p["time_mix_receptance"].reshape(-1)), p["receptance.weight"]))
            outs.append(r * linear(k, p["value.weight"]))
            old = x[b, t]
    return torch.stack(outs).reshape(x.shape), x[:, -1]


def rwkv6(r, k, v, log_decay, u, state=None, scale=1.0):
    """r, k, log_decay (B,H,T,D), v (B,H,T,V), u (H,D) -> o (B,H,T,V), state (B,H,D,V)."""
    batch, heads, length, d = r.shape
    outs, ends = [], []
    for b in range(batch):
        for h in range(heads):
            s = r.new_zeros(d, v.shape[3]) if state is None else state[b, h]
            for t in range(length):
                pair = k[b, h, t][:, None] * v[b, h, t][None, :]
                outs.append(((scale * r[b, h, t])[:, None] * (s + u[h][:, None] * pair)).sum(0))
                s = torch.exp(log_decay[b, h, t])[:, None] * s + pair
            ends.append(s)
    shape = (batch, heads, d, v.shape[3])
    return torch.stack(outs).reshape(batch, heads, length, -1), torch.stack(ends).reshape(shape)


def initial(width, dim, layer, layers):
    """decay_speed (A,), m_k, m_v, m_r (M,); the powers' order as printed."""
    part = layer / (layers - 1)
    decay = [-5 + 8 * (c / (width - 1)) ** (0.7 + 1.3 * part) for c in range(width)]
    m_k = [(c / dim) ** (1 - layer / layers) for c in range(dim)]
    m_r = [math.pow(c / dim, 0.5 * (1 - layer / layers)) for c in range(dim)]
    return tuple(torch.tensor(a).double() for a in (decay, m_k, [a + 0.3 * part for a in m_k], m_r))
