"""Mamba-2 in loops, token by token, and its attention form.

Written from the equations alone, by someone who has read neither code nor test of the library.
"""

import torch


def linear(x, weight, bias=None):
    y = torch.stack([(row * x).sum() for row in weight])
    return y if bias is None else y + bias


def silu(z):
    return z * torch.sigmoid(z)


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


def ssd(x, dt, a, b_, c_, skip=None, state=None):
    """x (B,T,H,P), dt (B,T,H), a (H,) < 0, b_, c_ (B,T,G,N), skip (H,) -> o (B,T,H,P), state (B,H,P,N)."""
    batch, length, heads, p = x.shape
    groups, n = b_.shape[2:]
    outs, ends = [], []
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            s = torch.zeros(p, n, dtype=x.dtype) if state is None else state[b, h]
            for t in range(length):
                s = torch.exp(dt[b, t, h] * a[h]) * s + dt[b, t, h] * x[b, t, h][:, None] * b_[b, t, g][None, :]
                o = (s * c_[b, t, g][None, :]).sum(1)
                outs.append(o if skip is None else o + skip[h] * x[b, t, h])
            ends.append(s)
    o = torch.stack(outs).reshape(batch, heads, length, p).transpose(1, 2)
    return o, torch.stack(ends).reshape(batch, heads, p, n)


def ssd_attention(x, dt, a, b_, c_, skip):
    """The same as a causal linear attention."""
    batch, length, heads, _ = x.shape
    outs = []
    for b in range(batch):
        for t in range(length):
            for h in range(heads):
                g = h // (heads // b_.shape[2])
                o = skip[h] * x[b, t, h]
                for j in range(t + 1):
                    decay = torch.exp(sum((dt[b, r, h] * a[h] for r in range(j + 1, t + 1)), torch.zeros_like(a[h])))
                    o = o + decay * (c_[b, t, g] * b_[b, j, g]).sum() * dt[b, j, h] * x[b, j, h]
                outs.append(o)
    return torch.stack(outs).reshape(x.shape)


def mamba2(x, p, heads, head_dim, n, groups=1, dt_limits=(0.0, float("inf")), eps=1e-5, keep=None, core=None):
    """x (B,T,M); p: parameters by transformers' names -> out (B,T,M), state (B,H,P,N), rows before the conv (B,T,C)."""
    batch, length, _ = x.shape
    inner = heads * head_dim
    zs, cs, dts, pre = [], [], [], []
    for b in range(batch):
        rows = []
        for t in range(length):
            real = 1.0 if keep is None else keep[b, t]
            u = linear(x[b, t] * real, p["in_proj.weight"], p.get("in_proj.bias"))
            zs.append(u[:inner])
            rows.append(u[inner : u.shape[0] - heads])
            raw = u[u.shape[0] - heads :] + p["dt_bias"]
            dts.append(torch.clamp(torch.log1p(torch.exp(-raw.abs())) + raw.clamp(min=0), *dt_limits))
        pre.append(torch.stack(rows))
        for t, c in enumerate(causal_conv(rows, p["conv1d.weight"], p.get("conv1d.bias"))):
            cs.append(silu(c) * (1.0 if keep is None else keep[b, t]))
    c = torch.stack(cs).reshape(batch, length, -1)
    xs = c[..., :inner].reshape(batch, length, heads, head_dim)
    bs = c[..., inner : inner + groups * n].reshape(batch, length, groups, n)
    qs = c[..., inner + groups * n :].reshape(batch, length, groups, n)
    o, end = ssd(xs, torch.stack(dts).reshape(batch, length, heads), -torch.exp(p["A_log"]), bs, qs, p["D"])
    if core is not None:
        core.append((xs, torch.stack(dts).reshape(batch, length, heads), -torch.exp(p["A_log"]), bs, qs, p["D"], o))
    outs, width = [], inner // groups
    for b in range(batch):
        for t in range(length):
            y = o[b, t].reshape(-1) * silu(zs[b * length + t])
            parts = [y[g * width : (g + 1) * width] for g in range(groups)]
            y = torch.cat([part / torch.sqrt((part**2).mean() + eps) for part in parts]) * p["norm.weight"]
            outs.append(linear(y, p["out_proj.weight"], p.get("out_proj.bias")))
    return torch.stack(outs).reshape(x.shape), end, torch.stack(pre)
