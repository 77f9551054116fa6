"""Retention in loops. Written from the equations before the vectorised code was."""

import cmath
import math

import torch
import torch.nn.functional as F


def naive_retention(q, k, v, gamma):
    """o_i = sum_{j <= i} gamma^(i - j) (q_i . k_j / sqrt(D)) v_j for one head: q, k (T, D); v (T, V)."""
    T, D = q.shape
    outs = []
    for i in range(T):
        out = torch.zeros(v.shape[1], dtype=q.dtype)
        for j in range(i + 1):
            weight = gamma ** (i - j) * sum(q[i, d] * k[j, d] for d in range(D)) / math.sqrt(D)
            out = out + weight * v[j]
        outs.append(out)
    return torch.stack(outs)


def naive_turned(x, first=0):
    """Channels d and d + D/2 as a complex number, times exp(i n theta_d), theta_d = 10000^(-2 d / D). x (T, D)."""
    T, D = x.shape
    rows = []
    for n in range(T):
        row = [None] * D
        for d in range(D // 2):
            turn = cmath.exp(1j * (first + n) * 10000.0 ** (-2 * d / D))
            a, b = x[n, d], x[n, d + D // 2]
            row[d], row[d + D // 2] = a * turn.real - b * turn.imag, a * turn.imag + b * turn.real
        rows.append(torch.stack(row))
    return torch.stack(rows)


def naive_gammas(heads):
    return [1 - 2.0 ** (-5 - h) for h in range(heads)]


def naive_layer(x, w, *, heads, gammas, rotary=True, norm="rms", gate=True, eps=1e-5):
    """One sequence x (T, M). w: q, k, v, o, g (out x in); the norm's weight norm (V,) for "rms"."""
    q, k, v = x @ w["q"].T, x @ w["k"].T, x @ w["v"].T
    D, V = q.shape[1] // heads, v.shape[1] // heads
    parts = []
    for h in range(heads):
        query, key = q[:, h * D : (h + 1) * D], k[:, h * D : (h + 1) * D]
        if rotary:
            query, key = naive_turned(query), naive_turned(key)
        out = naive_retention(query, key, v[:, h * V : (h + 1) * V], gammas[h])
        rows = []
        for t in range(len(x)):
            o = out[t] - out[t].mean() if norm == "group" else out[t]
            row = w["norm"] * o / torch.sqrt((o**2).mean() + eps)
            rows.append(row * F.silu(w["g"][h * V : (h + 1) * V] @ x[t]) if gate else row)
        parts.append(torch.stack(rows))
    return torch.cat(parts, 1) @ w["o"].T
