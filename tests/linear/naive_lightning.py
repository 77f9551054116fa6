"""Naive Lightning attention: causal linear attention with exponential decay and no denominator."""

import torch


def naive_lightning(q, k, v, slopes):
    """o_t = sum_{u <= t} exp(-s_h (t - u)) (q_t . k_u) v_u   (arXiv 2307.14995, the core; u = t has weight 1).

    q, k (B, H, T, D); v (B, H, T, V); slopes s_h > 0: H numbers in any shape. No 1 / sqrt(D). Returns (B, H, T, V).
    """
    B, H, T, _ = q.shape
    slopes = slopes.reshape(H).to(q.dtype)
    heads = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                total = torch.zeros(v.shape[-1], dtype=q.dtype)
                for u in range(t + 1):
                    weight = torch.exp(-slopes[h] * (t - u)) * torch.einsum("d,d->", q[b, h, t], k[b, h, u])
                    total = total + weight * v[b, h, u]
                heads.append(total)
    return torch.stack(heads).reshape(B, H, T, -1)


def naive_slopes(num_heads):
    """The rule of the slopes: s_h = 2^(-8 h / H), h = 1 .. H, for a power of two; otherwise those of the largest power
    of two below, then every second slope of twice that power. Returns a list of H numbers."""
    power = 1
    while 2 * power <= num_heads:
        power *= 2
    slopes = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2.0 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1)][0::2]
    return slopes + between[: num_heads - power]


def naive_layer_factor(layer, num_layers):
    """What the slopes of layer 0 .. num_layers - 1 are multiplied by: 1 - l / (L - 1) + 1e-5."""
    return 1 - layer / (num_layers - 1) + 1e-5


def naive_lrpe(x, theta, offset=0):
    """[x_t cos(t theta), x_t sin(t theta)], t counted from `offset`.

    x (B, H, T, D), theta (H, 1, D) -> (B, H, T, 2D).
    """
    B, H, T, D = x.shape
    out = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                angle = (t + offset) * theta[h, 0]
                out.append(torch.cat([x[b, h, t] * torch.cos(angle), x[b, h, t] * torch.sin(angle)]))
    return torch.stack(out).reshape(B, H, T, 2 * D)


def naive_simple_rms_norm(y, eps):
    """y / sqrt(mean(y^2) + eps) over the last axis. y (B, T, M) -> (B, T, M)."""
    B, T, M = y.shape
    rows = []
    for b in range(B):
        for t in range(T):
            mean = sum(y[b, t, m] ** 2 for m in range(M)) / M
            rows.append(y[b, t] / torch.sqrt(mean + eps))
    return torch.stack(rows).reshape(B, T, M)
