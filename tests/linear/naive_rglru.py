"""The real-gated linear recurrent unit in loops, token by token.

Written from the equations alone, by someone who has read neither code nor test of the library.
"""

import math

import torch


def linear(x, weight, bias=None):
    y = torch.stack([(row * x).sum() for row in weight])
    return y if bias is None else y + bias


def gelu_tanh(z):
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


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


def block_gate(u, weight, bias):
    """sigmoid(u G + b), G block diagonal: weight (H, in, out), bias (H, out), u (W,)."""
    heads, size, _ = weight.shape
    parts = [linear(u[h * size : (h + 1) * size], weight[h].T, bias[h]) for h in range(heads)]
    return torch.sigmoid(torch.cat(parts))


def rg_lru(u, p, positions=None, state=None, c=8.0):
    """u (B,T,W), positions (B,T) (0 = a document's first token) -> h (B,T,W), last h (B,W)."""
    batch, length, width = u.shape
    outs, ends = [], []
    for b in range(batch):
        h = torch.zeros(width, dtype=u.dtype) if state is None else state[b]
        for t in range(length):
            i = block_gate(u[b, t], p["rg_lru.input_gate_weight"], p["rg_lru.input_gate_bias"])
            r = block_gate(u[b, t], p["rg_lru.recurrent_gate_weight"], p["rg_lru.recurrent_gate_bias"])
            log_a = -c * r * softplus(p["rg_lru.recurrent_param"])
            if positions is not None and int(positions[b, t]) == 0:
                h = i * u[b, t]
            else:
                h = torch.exp(log_a) * h + torch.sqrt(-torch.expm1(2 * log_a)) * i * u[b, t]
            outs.append(h)
        ends.append(h)
    return torch.stack(outs).reshape(u.shape), torch.stack(ends)


def block(x, p, positions=None):
    """x (B,T,M), p: parameters by transformers' names -> out (B,T,M), last h (B,W), the conv's inputs (B,T,W)."""
    batch, length, _ = x.shape
    us, ys, pre = [], [], []
    for b in range(batch):
        rows = [linear(x[b, t], p["linear_x.weight"], p["linear_x.bias"]) for t in range(length)]
        ys.append([gelu_tanh(linear(x[b, t], p["linear_y.weight"], p["linear_y.bias"])) for t in range(length)])
        us.append(torch.stack(causal_conv(rows, p["conv_1d.weight"], p["conv_1d.bias"])))
        pre.append(torch.stack(rows))
    h, end = rg_lru(torch.stack(us), p, positions)
    outs = []
    for b in range(batch):
        for t in range(length):
            outs.append(linear(h[b, t] * ys[b][t], p["linear_out.weight"], p["linear_out.bias"]))
    return torch.stack(outs).reshape(x.shape), end, torch.stack(pre)
