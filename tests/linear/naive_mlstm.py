"""mLSTM, cell and layer, in loops, token by token, and as weights of all pairs.

Written from the equations alone, by someone who has read neither code nor test of the library.
"""

import math

import torch

from naive import linear


def logsigmoid(z):
    return torch.clamp(z, max=0) - torch.log1p(torch.exp(-z.abs()))


def cap(z, c=15.0):
    return c * torch.tanh(z / c)


def cell(q, k, v, i, f, state=None, eps=1e-6):
    """q, k (B,H,T,D), v (B,H,T,V), i, f (B,H,T) capped -> h (B,H,T,V), (C (B,H,D,V), n (B,H,D), m (B,H))."""
    batch, heads, length, d = q.shape
    outs, cs, ns, ms = [], [], [], []
    for b in range(batch):
        for h in range(heads):
            c, n, m = q.new_zeros(d, v.shape[3]), q.new_zeros(d), q.new_zeros(())
            if state is not None:
                c, n, m = (s[b, h] for s in state)
            for t in range(length):
                log_f = logsigmoid(f[b, h, t])
                new = torch.maximum(log_f + m, i[b, h, t])
                old, add = torch.exp(log_f + m - new), torch.exp(i[b, h, t] - new)
                c = old * c + add * k[b, h, t][:, None] * v[b, h, t][None, :]
                n, m = old * n + add * k[b, h, t], new
                num = (q[b, h, t][:, None] * c).sum(0) / math.sqrt(d)
                den = torch.maximum((q[b, h, t] * n).sum().abs() / math.sqrt(d), torch.exp(-m))
                outs.append(num / (den + eps))
            cs.append(c), ns.append(n), ms.append(m)
    shape = (batch, heads)
    state = (torch.stack(cs).reshape(*shape, d, -1), torch.stack(ns).reshape(*shape, d), torch.stack(ms).reshape(shape))
    return torch.stack(outs).reshape(*shape, length, -1), state


def parallel(q, k, v, i, f, eps=1e-6):
    """-> h (B,H,T,V), signed weights S (B,H,T,T) before the division."""
    batch, heads, length, d = q.shape
    outs, ws = [], []
    for b in range(batch):
        for h in range(heads):
            total, sums = q.new_zeros(()), []
            for t in range(length):
                total = total + logsigmoid(f[b, h, t])
                sums.append(total)
            for t in range(length):
                logs = [sums[t] - sums[j] + i[b, h, j] for j in range(t + 1)]
                m = torch.stack([*logs, sums[t]]).max()
                s = [(q[b, h, t] * k[b, h, j]).sum() / math.sqrt(d) * torch.exp(logs[j] - m) for j in range(t + 1)]
                den = torch.maximum(sum(s).abs(), torch.exp(-m)) + eps
                outs.append(sum(s[j] * v[b, h, j] for j in range(t + 1)) / den)
                ws.append(torch.stack(s + [q.new_zeros(())] * (length - 1 - t)))
    return torch.stack(outs).reshape(batch, heads, length, -1), torch.stack(ws).reshape(batch, heads, length, length)


def project(x, p, heads, c=15.0):
    """-> q, k, v (B,H,T,.), i, f (B,H,T)."""
    batch, length, _ = x.shape
    rows = [x[b, t] for b in range(batch) for t in range(length)]
    q, k, v = (torch.stack([linear(r, p[n + ".weight"]) for r in rows]) for n in "qkv")
    q, k, v = (a.reshape(batch, length, heads, -1).transpose(1, 2) for a in (q, k, v))
    i, f = (torch.stack([cap(linear(r, p[n + ".weight"], p[n + ".bias"]), c) for r in rows])
            for n in ("igate_preact", "fgate_preact"))  # fmt: skip
    return q, k, v, i.reshape(batch, length, heads).transpose(1, 2), f.reshape(batch, length, heads).transpose(1, 2)


def layer(x, p, heads, eps=1e-6, norm_eps=1e-6, state=None):
    """x (B,T,M); p: parameters by transformers' names -> out (B,T,M), h, state."""
    batch, length, _ = x.shape
    h, end = cell(*project(x, p, heads), state=state, eps=eps)
    outs = []
    for b in range(batch):
        for t in range(length):
            parts = [a - a.mean() for a in h[b, :, t]]
            y = torch.cat([a / torch.sqrt((a**2).mean() + norm_eps) for a in parts]) * p["multihead_norm.weight"]
            outs.append(linear(y * torch.sigmoid(linear(x[b, t], p["ogate_preact.weight"])), p["out_proj.weight"]))
    return torch.stack(outs).reshape(batch, length, -1), h, end
