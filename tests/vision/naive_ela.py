"""Efficient local attention in loops; their author saw only an account of the paper, neither code nor test."""

import torch


def strip_pool(x):
    """Eq. 1. x (B,C,Y,X) -> h (B,C,Y), the mean over x, and v (B,C,X), the mean over y."""
    B, C, Y, X = x.shape
    h = torch.empty(B, C, Y, dtype=x.dtype)
    v = torch.empty(B, C, X, dtype=x.dtype)
    for b in range(B):
        for c in range(C):
            for y in range(Y):
                h[b, c, y] = sum(x[b, c, y, i] for i in range(X)) / X
            for i in range(X):
                v[b, c, i] = sum(x[b, c, y, i] for y in range(Y)) / Y
    return h, v


def conv1d(s, weight, groups):
    """s (B,C,L), weight (C, C/groups, k) with odd k, zero padding k//2, no bias -> (B,C,L)."""
    B, C, L = s.shape
    per, k = weight.shape[1], weight.shape[2]
    assert k % 2 == 1
    assert per * groups == C
    out = torch.empty(B, C, L, dtype=s.dtype)
    for b in range(B):
        for c in range(C):
            g = c // (C // groups)
            for n in range(L):
                a = torch.zeros((), dtype=s.dtype)
                for m in range(per):
                    for t in range(k):
                        j = n + t - k // 2
                        if 0 <= j < L:
                            a = a + weight[c, m, t] * s[b, g * per + m, j]
                out[b, c, n] = a
    return out


def group_norm(s, norm_groups, weight, bias, eps=1e-5):
    """s (B,C,L): mean and biased variance over (channels of a group) x (length); weight, bias (C,)."""
    B, C, L = s.shape
    per = C // norm_groups
    assert per * norm_groups == C
    out = torch.empty(B, C, L, dtype=s.dtype)
    for b in range(B):
        for g in range(norm_groups):
            values = [s[b, g * per + m, n] for m in range(per) for n in range(L)]
            mean = sum(values) / len(values)
            var = sum((u - mean) ** 2 for u in values) / len(values)
            for m in range(per):
                c = g * per + m
                for n in range(L):
                    out[b, c, n] = (s[b, c, n] - mean) / torch.sqrt(var + eps) * weight[c] + bias[c]
    return out


def strip_gate(s, conv_weight, gn_weight, gn_bias, *, groups, norm_groups):
    """Eq. 2. sigmoid(GN(Conv1d(s))), s (B,C,L) -> (B,C,L)."""
    return torch.sigmoid(group_norm(conv1d(s, conv_weight, groups), norm_groups, gn_weight, gn_bias))


def efficient_local_attention(
    x,
    conv_weight,
    gn_weight,
    gn_bias,
    *,
    groups=None,
    norm_groups=16,
    conv_weight_x=None,
    gn_weight_x=None,
    gn_bias_x=None,
):
    """Eq. 3. x (B,C,Y,X); conv_weight (C, C/groups, k), gn_weight, gn_bias (C,) -> (B,C,Y,X). groups None = C
    (depthwise).

    shared=True (the known code): leave the *_x arguments out, both strips go through the same convolution and norm.
    shared=False: conv_weight, gn_* act on the strip along Y, conv_weight_x, gn_*_x on the strip along X.
    OPEN: whether with shared=False the GroupNorm is doubled too. The account says "the paper writes F_h and F_w,
    two convolutions"
    (recalled) and nothing of the norm: a *_x norm that isn't given falls back to the shared one, so both readings
    can be asked."""
    B, C, Y, X = x.shape
    groups = C if groups is None else groups
    h, v = strip_pool(x)
    a = strip_gate(h, conv_weight, gn_weight, gn_bias, groups=groups, norm_groups=norm_groups)
    e = strip_gate(
        v,
        conv_weight if conv_weight_x is None else conv_weight_x,
        gn_weight if gn_weight_x is None else gn_weight_x,
        gn_bias if gn_bias_x is None else gn_bias_x,
        groups=groups,
        norm_groups=norm_groups,
    )
    out = torch.empty_like(x)
    for b in range(B):
        for c in range(C):
            for y in range(Y):
                for i in range(X):
                    out[b, c, y, i] = x[b, c, y, i] * a[b, c, y] * e[b, c, i]
    return out


def parameter_count(dim, kernel_size, groups, *, shared=True):
    """Convolution C (C/groups) k plus the norm 2 C (twice both when not shared)."""
    one = dim * (dim // groups) * kernel_size + 2 * dim
    return one if shared else 2 * one
