"""Oracle A110: SeqBoat, sparse modular activation. Equations 1-7 of the account; compression per sample.

Its author has read neither the code nor its tests.
Largest difference to the golden numbers: values 4.5e-15, gradients 2.0e-14, active tokens equal (`whole` needs
original_places; compressed, its samples 0 and 2 differ by 6e-3, as the account says).
"""

import math

import torch


def linear(x, w, b):
    return torch.stack([(row * x).sum() for row in w]) + b


def softmax(scores):
    top = max(float(s.detach()) for s in scores)
    e = [torch.exp(s - top) for s in scores]
    total = sum(e)
    return [x / total for x in e]


def silu(z):
    return z * torch.sigmoid(z)


def norm(x, weight, bias, kind="layer", eps=1e-5):
    """x (B,T,M): over M per token, or ("batch") over all (B,T) per channel with the statistics of this batch."""
    axes = (2,) if kind == "layer" else (0, 1)
    d = x - x.mean(axes, keepdim=True)
    return d / torch.sqrt((d**2).mean(axes, keepdim=True) + eps) * weight + bias


def ema(u, p, keep=None):
    """Eq. 1 for one sample. u (T,M); p: delta, alpha, beta (M or 2M,N), gamma (M or 2M,N), omega (M) -> (T,M)."""
    length, m = u.shape
    states = p["gamma"].shape[1]
    out = [[p["omega"][c] * u[t, c] for c in range(m)] for t in range(length)]
    for side in range(p["gamma"].shape[0] // m):  # the second set runs backwards; both include the current token
        for c in range(m):
            row = side * m + c
            for n in range(states):
                a = torch.sigmoid(p["delta"][row, n])
                decay, s = 1 - a * torch.sigmoid(p["alpha"][row, n]), u.new_zeros(())
                for t in range(length) if side == 0 else reversed(range(length)):
                    x = u[t, c] if keep is None or bool(keep[t]) else u.new_zeros(())
                    s = decay * s + a * p["beta"][row, n] * x
                    out[t][c] = out[t][c] + p["gamma"][row, n] * s / math.sqrt(states)
    return torch.stack([torch.stack(row) for row in out])


def compress(x, active):
    """Eq. 3. x (B,T,C), active (B,T) -> packed (B,A,C) with zeros after the last, index (B,A), -1 where empty."""
    index = [[t for t in range(x.shape[1]) if bool(row[t])] for row in active]
    longest = max(len(row) for row in index)
    index = [row + [-1] * (longest - len(row)) for row in index]
    packed = [[x[b, t] if t >= 0 else torch.zeros_like(x[b, 0]) for t in row] for b, row in enumerate(index)]
    packed = torch.stack([torch.stack(row) for row in packed]) if longest else x[:, :0]
    return packed, torch.tensor(index, dtype=torch.long).reshape(x.shape[0], longest)


def extract(packed, index, length):
    """The inverse: packed (B,A,C) -> (B,T,C), 0 where nothing was."""
    where = [{int(t): packed[b, i] for i, t in enumerate(row) if t >= 0} for b, row in enumerate(index)]
    zero = packed.new_zeros(packed.shape[2])
    return torch.stack([torch.stack([row.get(t, zero) for t in range(length)]) for row in where])


def rotate(x, pos, base=10000.0):
    half = len(x) // 2
    angle = pos * base ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def seqboat(x, p, keep=None, *, window, causal, activation="relu2", position="relative", prenorm=True, kind="layer",
            original_places=False):  # fmt: skip
    """x (B,T,M), keep (B,T) -> y (B,T,M), active (B,T), P (B,T,2). p: weights by the names used below.

    original_places: the window counts original places, as the authors' code does for a batch with an all-active sample.
    """
    batch, length, _ = x.shape
    u = norm(x, p["norm_w"], p["norm_b"], kind) if prenorm else x
    m = torch.stack([silu(ema(u[b], p, None if keep is None else keep[b])) for b in range(batch)])  # eq. 1
    head = torch.stack([torch.stack([linear(a, p["hx_w"], p["hx_b"]) for a in m[b]]) for b in range(batch)])
    temp = torch.exp(p["temp"].reshape(()))
    route = torch.stack([torch.stack([torch.stack(softmax(list(a[:2] / temp))) for a in row]) for row in head])
    skip = head[..., 2:]  # eq. 2
    active = route[..., 1] > route[..., 0]
    if keep is not None:
        active = active & keep
    c, index = compress(m, active)  # eq. 3
    z, h = p["gamma_qk"].shape[1], p["h_w"].shape[1]
    bias, outs = p.get("rel_bias"), []
    for b in range(batch):
        pos = [int(t) for t in index[b] if t >= 0]
        packed = [silu(linear(c[b, i], p["mx_w"], p["mx_b"])) for i in range(len(pos))]  # eq. 4
        q = [a[:z] * p["gamma_qk"][0] + p["beta_qk"][0] for a in packed]
        k = [a[:z] * p["gamma_qk"][1] + p["beta_qk"][1] for a in packed]
        gate, v = [a[z : z + h] for a in packed], [a[z + h :] for a in packed]
        if position == "rotary":
            q, k = ([rotate(a, t) for a, t in zip(side, pos, strict=True)] for side in (q, k))
        scale = z**-0.5 if activation == "softmax" else 1 / (window if causal else 2 * window)
        for i in range(len(pos)):
            where = pos if original_places else range(len(pos))
            seen = [j for j in range(len(pos)) if abs(where[i] - where[j]) <= window and (j <= i or not causal)]
            s = [(q[i] * k[j]).sum() * scale for j in seen]  # eq. 5
            if position == "relative":
                top = (len(bias) - 1) // 2
                s = [a + bias[top + max(-top, min(top, pos[j] - pos[i]))] for a, j in zip(s, seen, strict=True)]
            w = softmax(s) if activation == "softmax" else [torch.clamp(a, min=0) ** 2 for a in s]
            o = sum(a * v[j] for a, j in zip(w, seen, strict=True)) * gate[i]
            outs.append(linear(o, p["h_w"], p["h_b"]) * route[b, pos[i], 1])  # eq. 6: gated after the projection
        outs += [torch.zeros_like(x[b, 0])] * (index.shape[1] - len(pos))
    o = torch.stack(outs).reshape(batch, -1, x.shape[2]) if outs else x[:, :0]
    y = silu(skip + extract(o, index, length) + x)  # eq. 7
    return (y if prenorm else norm(y, p["norm_w"], p["norm_b"], kind)), active, route
