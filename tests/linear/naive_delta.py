"""The delta rule and its layers, token by token in loops. Written from the equations before the vectorised code was."""

import math

import torch
import torch.nn.functional as F


def naive_delta(q, k, v, beta, decay, state):
    """S' = diag(exp g_t) S,  S <- S' + beta_t k_t^T (v_t - k_t S'),  o_t = (q_t / sqrt(D)) S, for one head.

    q, k, decay (T, D); v (T, V); beta (T,); state (D, V). Returns (T, V) and the last state.
    """
    T, D = q.shape
    V = v.shape[1]
    outs = []
    for t in range(T):
        kept = torch.stack([torch.exp(decay[t, d]) * state[d] for d in range(D)])
        read = sum(k[t, d] * kept[d] for d in range(D))
        error = v[t] - read
        state = torch.stack([kept[d] + beta[t] * k[t, d] * error for d in range(D)])
        out = torch.zeros(V, dtype=q.dtype)
        for d in range(D):
            out = out + q[t, d] / math.sqrt(D) * state[d]
        outs.append(out)
    return torch.stack(outs), state


def naive_conv(x, taps):
    """silu of sum_j taps[:, j] x_{t - (K - 1) + j}, nothing before the first token. x (T, C); taps (C, K)."""
    T, K = x.shape[0], taps.shape[1]
    rows = []
    for t in range(T):
        total = torch.zeros_like(x[0])
        for j in range(K):
            if t - (K - 1) + j >= 0:
                total = total + taps[:, j] * x[t - (K - 1) + j]
        rows.append(F.silu(total))
    return torch.stack(rows)


def naive_length_one(x):
    return x / torch.sqrt((x * x).sum() + 1e-6)


def naive_layer(x, w, *, key_heads, heads, decay, rate=1.0, gate=None, eps):
    """One sequence x (T, M) through a whole layer.

    w: matrices q, k, v, b and o (out x in), taps q_taps, k_taps, v_taps (C, K) or None, the norm's weight norm (V,).
    decay: (T, heads, D) or None for no forgetting. rate: beta is that times a sigmoid. gate: (T, heads, V), already
    through its activation, or None.
    """
    mixed = {}
    for n in "qkv":
        z = x @ w[n].T
        taps = w[f"{n}_taps"]
        mixed[n] = F.silu(z) if taps is None else naive_conv(z, taps)
    T = len(x)
    D, V = mixed["q"].shape[1] // key_heads, mixed["v"].shape[1] // heads
    parts = []
    for h in range(heads):
        at = h // (heads // key_heads)
        q = torch.stack([naive_length_one(mixed["q"][t, at * D : (at + 1) * D]) for t in range(T)])
        k = torch.stack([naive_length_one(mixed["k"][t, at * D : (at + 1) * D]) for t in range(T)])
        v = mixed["v"][:, h * V : (h + 1) * V]
        beta = rate * torch.sigmoid(x @ w["b"][h])
        g = torch.zeros(T, D, dtype=x.dtype) if decay is None else decay[:, h]
        out, _ = naive_delta(q, k, v, beta, g, torch.zeros(D, V, dtype=x.dtype))
        rows = []
        for t in range(T):
            row = w["norm"] * out[t] / torch.sqrt((out[t] ** 2).mean() + eps)
            rows.append(row if gate is None else row * gate[t, h])
        parts.append(torch.stack(rows))
    return torch.cat(parts, 1) @ w["o"].T
