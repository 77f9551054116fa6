"""Gated linear attention in loops. Written from the equations before the vectorised code was."""

import math

import torch
import torch.nn.functional as F


def naive_gla(q, k, v, decay, state):
    """S <- diag(exp g_t) S + k_t^T v_t,  o_t = (q_t / sqrt(D)) S, for one head: q, k, decay (T, D); v (T, V)."""
    T, D = q.shape
    outs = []
    for t in range(T):
        state = torch.stack([torch.exp(decay[t, d]) * state[d] + k[t, d] * v[t] for d in range(D)])
        outs.append(sum(q[t, d] * state[d] for d in range(D)) / math.sqrt(D))
    return torch.stack(outs), state


def naive_layer(x, w, *, heads, key_heads, temperature=16.0, least=None, gate=True, eps=1e-5):
    """One sequence x (T, M). w: q, k, v, o, g (out x in), a (rank x M), b (key_heads D x rank) with bias, norm (V,)."""
    q, k, v = x @ w["q"].T, x @ w["k"].T, x @ w["v"].T
    D, V = q.shape[1] // heads, v.shape[1] // key_heads
    decay = F.logsigmoid((x @ w["a"].T) @ w["b"].T + w["bias"]) / temperature
    if least is not None:
        decay = torch.clamp(decay, min=least)
    parts = []
    for h in range(heads):
        g = h // (heads // key_heads)
        key, value = slice(g * D, (g + 1) * D), slice(g * V, (g + 1) * V)
        out, _ = naive_gla(
            q[:, h * D : (h + 1) * D], k[:, key], v[:, value], decay[:, key], torch.zeros(D, V, dtype=x.dtype)
        )
        for_head = []
        for t in range(len(x)):
            row = w["norm"] * out[t] / torch.sqrt((out[t] ** 2).mean() + eps)
            for_head.append(row * F.silu(w["g"][h * V : (h + 1) * V] @ x[t]) if gate else row)
        parts.append(torch.stack(for_head))
    return torch.cat(parts, 1) @ w["o"].T
