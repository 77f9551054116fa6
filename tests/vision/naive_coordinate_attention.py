"""Coordinate attention, two of timm's variants of it, and the form for three axes, written out strip by strip.

Its author saw only the account of the papers' formulas, neither this library's code nor its tests. Loops over samples
and strip positions. A batch norm is a tuple (weight, bias, running_mean, running_var), each (R,). Pointwise weights may
be (O, I) or (O, I, 1, 1).
"""

import torch
import torch.nn.functional as F


def _matrix(weight):
    return weight.reshape(weight.shape[0], -1)


def sigmoid(z):
    return 1 / (1 + torch.exp(-z))


def hswish(t):
    """t clamp(t + 3, 0, 6) / 6 (in the official code a module of its own: t * relu6(t + 3) / 6)."""
    return t * torch.clamp(t + 3, 0, 6) / 6


def batch_norm(x, bn, *, training=False, eps=1e-5):
    """x (B, R, L). Training: statistics over batch and the WHOLE length, so over all strips together."""
    weight, bias, mean, var = bn
    out = []
    for c in range(x.shape[1]):
        m, s = (x[:, c].mean(), ((x[:, c] - x[:, c].mean()) ** 2).mean()) if training else (mean[c], var[c])
        out.append(weight[c] * (x[:, c] - m) / torch.sqrt(s + eps) + bias[c])
    return torch.stack(out, dim=1)


def pointwise(weight, bias, strip):
    """weight (O, I), bias (O,) or None, strip (B, I, L) -> (B, O, L)."""
    W = _matrix(weight)
    rows = []
    for b in range(strip.shape[0]):
        cols = [W @ strip[b, :, l] for l in range(strip.shape[2])]
        rows.append(torch.stack([c if bias is None else c + bias for c in cols], dim=1))
    return torch.stack(rows)


def strip_mean(x, axis):
    """Mean of x (B, C, n_0, n_1, ...) over every map axis but `axis` -> (B, C, n_axis)."""
    cols = []
    for i in range(x.shape[2 + axis]):
        s = x.select(2 + axis, i)  # (B, C, other axes)
        cols.append(s.flatten(2).mean(dim=2))
    return torch.stack(cols, dim=2)


def coordinate_gates(x, w1, b1, bn, gate_weights, gate_biases, *, training=False, act=hswish):
    """Equations 1 to 3. x (B, C, n_0, n_1[, n_2]); w1 (R, C), b1 (R,) or None; gate_weights: one (C, R) for each axis,
    gate_biases one (C,) or None each -> list of gates (B, C, n_axis). The strip of axis a gates along axis a."""
    axes = x.dim() - 2
    strips = [strip_mean(x, a) for a in range(axes)]
    z = act(batch_norm(pointwise(w1, b1, torch.cat(strips, dim=2)), bn, training=training))
    gates, start = [], 0
    for a in range(axes):
        n = x.shape[2 + a]
        gates.append(sigmoid(pointwise(gate_weights[a], gate_biases[a], z[:, :, start : start + n])))
        start += n
    return gates


def coordinate_attention(x, w1, b1, bn, gate_weights, gate_biases, *, training=False, act=hswish):
    """Equation 4: out_c(y, x) = x_c(y, x) g_c,y g_c,x; no residual. Two axes is the official form.
    Reduced width R = max(8, C // reduction)."""
    # OPEN: three axes (B,C,Z,Y,X) are inferred in the account: strips in the order Z, Y, X, product of three gates.
    gates = coordinate_gates(x, w1, b1, bn, gate_weights, gate_biases, training=training, act=act)
    out = x
    for a, g in enumerate(gates):
        out = torch.stack(
            [
                out.select(2 + a, i) * g[:, :, i].reshape(g.shape[0], g.shape[1], *[1] * (x.dim() - 3))
                for i in range(x.shape[2 + a])
            ],
            dim=2 + a,
        )
    return out


def timm_reduced_width(C, ratio=1 / 16, factor=2 / 3, divisor=8):
    """C * ratio * factor rounded to a multiple of divisor, never below it."""
    return max(divisor, int(C * ratio * factor + divisor / 2) // divisor * divisor)


def reduced_width(C, reduction=32):
    return max(8, C // reduction)


# ----------------------------------------------------------------- timm variants


def coordinate_attention_simple(x, w1, b1, h_weight, h_bias, w_weight, w_bias):
    """timm "simple": no norm, shared W1, SiLU, ONE sigmoid of the sum of both strips. w1 (R, C), b1 (R,);
    h_weight, w_weight (C, R), h_bias, w_bias (C,). Read in timm's SimpleCoordAttn (biases on by default); no golden."""
    gh = pointwise(h_weight, h_bias, F.silu(pointwise(w1, b1, strip_mean(x, 0))))
    gw = pointwise(w_weight, w_bias, F.silu(pointwise(w1, b1, strip_mean(x, 1))))
    return x * sigmoid(gh[:, :, :, None] + gw[:, :, None, :])


def depthwise_1d(strip, weight, bias=None):
    """strip (B, C, L), weight (C, ..., k) one kernel for each channel, zero padding k//2."""
    B, C, L = strip.shape
    w = weight.reshape(C, -1)
    k = w.shape[1]
    out = []
    for l in range(L):
        total = strip.new_zeros(B, C) if bias is None else bias.expand(B, C)
        for i in range(k):
            j = l + i - k // 2
            if 0 <= j < L:
                total = total + strip[:, :, j] * w[:, i]
        out.append(total)
    return torch.stack(out, dim=2)


def group_norm_one(z, weight, bias, eps=1e-5):
    """GroupNorm with ONE group: per sample over channels and length. z (B, C, L)."""
    out = []
    for b in range(z.shape[0]):
        m = z[b].mean()
        s = ((z[b] - m) ** 2).mean()
        out.append(weight[:, None] * (z[b] - m) / torch.sqrt(s + eps) + bias[:, None])
    return torch.stack(out)


def efficient_local_attention(x, h_weight, w_weight, h_norm, w_norm, *, h_bias=None, w_bias=None, act=F.silu):
    """timm "ela": no reduction; depthwise 1-D conv (width 7, golden 3) along each strip, GroupNorm with one group,
    SiLU, sigmoid; both gates multiply. h_weight (C,1,k,1), w_weight (C,1,1,k); h_norm, w_norm: (weight, bias)."""
    gh = sigmoid(act(group_norm_one(depthwise_1d(strip_mean(x, 0), h_weight, h_bias), *h_norm)))
    gw = sigmoid(act(group_norm_one(depthwise_1d(strip_mean(x, 1), w_weight, w_bias), *w_norm)))
    return x * gh[:, :, :, None] * gw[:, :, None, :]


def strip_attention(x, h_weight, w_weight, *, h_bias=None, w_bias=None):
    """timm "strip": depthwise 1-D conv (width 3 by default, one for each strip), sigmoid of the sum. Read in timm's
    StripAttn; no golden. h_weight (C,1,k,1), w_weight (C,1,1,k)."""
    gh = depthwise_1d(strip_mean(x, 0), h_weight, h_bias)
    gw = depthwise_1d(strip_mean(x, 1), w_weight, w_bias)
    return x * sigmoid(gh[:, :, :, None] + gw[:, :, None, :])
