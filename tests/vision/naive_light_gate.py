"""The stand-in for a light gate, in loops; their author saw only an account, neither code nor test."""

import torch


def dense(v, w, b):
    """v (n,), w (m,n), b (m,) -> (m,)."""
    return torch.stack([sum(w[i, j] * v[j] for j in range(v.shape[0])) for i in range(w.shape[0])]) + b


def channel_gate(x, w1, b1, w2, b2):
    """Eq. 1. a = sigmoid(W2 ReLU(W1 mean_{y,x} x + b1) + b2), w1 (C//r, C), w2 (C, C//r) -> (B,C)."""
    B, _C, Y, X = x.shape
    out = []
    for b in range(B):
        mean = sum(x[b, :, y, i] for y in range(Y) for i in range(X)) / (Y * X)
        out.append(torch.sigmoid(dense(torch.relu(dense(mean, w1, b1)), w2, b2)))
    return torch.stack(out)


def space_gate(x, w, bias):
    """Eq. 2. m = sigmoid(w . x + b) at each place, w (C,) (or (1,C,1,1)), bias a number -> (B,Y,X)."""
    B, _C, Y, X = x.shape
    w, bias = w.reshape(-1), bias.reshape(())
    rows = [[[torch.sigmoid((w * x[b, :, y, i]).sum() + bias) for i in range(X)] for y in range(Y)] for b in range(B)]
    return torch.stack([torch.stack([torch.stack(r) for r in m]) for m in rows])


def gate(x, channel=None, space=None, *, axes="both"):
    """The gate itself (B,C,Y,X): a, m or a m, both from the same x. channel = (w1, b1, w2, b2), space = (w, b)."""
    g = torch.ones_like(x)
    if axes in ("both", "channel"):
        g = g * channel_gate(x, *channel)[:, :, None, None]
    if axes in ("both", "space"):
        g = g * space_gate(x, *space)[:, None]
    return g


def light_gate(x, channel=None, space=None, *, axes="both", residual=False):
    """Eq. 1-4. residual=False: y = x gate (inside a residual branch, before the sum); True: x + x gate (after a
    stage)."""
    y = x * gate(x, channel, space, axes=axes)
    return x + y if residual else y


def parameter_count(dim, reduction=16, axes="both"):
    """Channel: C h + h + h C + C with h = C // r. Space: C + 1."""
    h = max(dim // reduction, 1)
    return (2 * dim * h + h + dim if axes in ("both", "channel") else 0) + (dim + 1 if axes in ("both", "space") else 0)
