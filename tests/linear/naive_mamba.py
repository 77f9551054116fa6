"""Mamba's selective scan in loops, token by token.

Written from the equations alone, by someone who has read neither code nor test of the library.
"""

import torch


def linear(x, weight, bias=None):
    y = torch.stack([(row * x).sum() for row in weight])
    return y if bias is None else y + bias


def silu(z):
    return z * torch.sigmoid(z)


def softplus(z):
    return torch.log1p(torch.exp(-z.abs())) + z.clamp(min=0)


def causal_conv(rows, weight, bias):
    """rows: list of T vectors (C,); weight (C,1,K) -> list of T vectors; depthwise, zeros before the start."""
    size = weight.shape[2]
    out = []
    for t in range(len(rows)):
        y = torch.zeros_like(rows[0]) if bias is None else bias
        for tap in range(size):
            s = t - (size - 1) + tap
            if s >= 0:
                y = y + weight[:, 0, tap] * rows[s]
        out.append(y)
    return out


def selective_scan(u, dt, a, b_, c_, skip=None, state=None):
    """u, dt (B,T,I), a (I,N) < 0, b_, c_ (B,T,N), skip (I,) -> o (B,T,I), state (B,I,N)."""
    batch, length, inner = u.shape
    outs, ends = [], []
    for b in range(batch):
        s = [torch.zeros(a.shape[1], dtype=u.dtype) if state is None else state[b, c] for c in range(inner)]
        for t in range(length):
            row = []
            for c in range(inner):
                s[c] = torch.exp(dt[b, t, c] * a[c]) * s[c] + dt[b, t, c] * b_[b, t] * u[b, t, c]
                o = (s[c] * c_[b, t]).sum()
                row.append(o if skip is None else o + skip[c] * u[b, t, c])
            outs.append(torch.stack(row))
        ends.append(torch.stack(s))
    return torch.stack(outs).reshape(u.shape), torch.stack(ends)


def mamba(x, p, n, keep=None):
    """x (B,T,M); p: parameters by transformers' names -> out (B,T,M), state (B,I,N), the conv's inputs (B,T,I)."""
    batch, length, _ = x.shape
    inner, rank = p["dt_proj.weight"].shape
    us, zs, dts, bs, cs, pre = [], [], [], [], [], []
    for b in range(batch):
        rows = []
        for t in range(length):
            real = 1.0 if keep is None else keep[b, t]
            uz = linear(x[b, t] * real, p["in_proj.weight"], p.get("in_proj.bias"))
            rows.append(uz[:inner])
            zs.append(uz[inner:])
        pre.append(torch.stack(rows))
        for t, u in enumerate(causal_conv(rows, p["conv1d.weight"], p.get("conv1d.bias"))):
            us.append(silu(u) * (1.0 if keep is None else keep[b, t]))
            dbc = linear(us[-1], p["x_proj.weight"])
            dts.append(softplus(linear(dbc[:rank], p["dt_proj.weight"], p["dt_proj.bias"])))
            bs.append(dbc[rank : rank + n])
            cs.append(dbc[rank + n :])
    u, dt, b_, c_ = (torch.stack(a).reshape(batch, length, -1) for a in (us, dts, bs, cs))
    o, end = selective_scan(u, dt, -torch.exp(p["A_log"]), b_, c_, p["D"])
    outs = []
    for b in range(batch):
        for t in range(length):
            outs.append(linear(o[b, t] * silu(zs[b * length + t]), p["out_proj.weight"], p.get("out_proj.bias")))
    return torch.stack(outs).reshape(x.shape), end, torch.stack(pre)


def bimamba(x, forward, backward, n, merge="mean", keep=None):
    """The second mixer reads the reversed sequence, its output is turned back."""
    y, _, _ = mamba(x, forward, n, keep)
    back, _, _ = mamba(x.flip(1), backward, n, None if keep is None else keep.flip(1))
    total = y + back.flip(1)
    return total / 2 if merge == "mean" else total
