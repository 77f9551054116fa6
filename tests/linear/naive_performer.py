"""Naive FAVOR+ (Performer), and the exact softmax attention that it estimates."""

import math

import torch


def naive_softmax_features(x, Omega, is_query, eps=0.0, stabilise=True):
    """Positive random features of the softmax kernel (arXiv 2009.14794).

    phi(x_t)_j = r^(-1/2) (exp(Omega_j . x~_t - |x~_t|^2 / 2 - max) + eps), x~ = D^(-1/4) x. The max is over the r
    features of the token for queries, over all tokens and features of the (batch, head) for keys, and has gradients
    like all else; stabilise=False leaves it out. x (B, H, T, D), Omega (r, D) -> (B, H, T, r).
    """
    B, H, T, D = x.shape
    r = Omega.shape[0]
    out = []
    for b in range(B):
        for h in range(H):
            scaled = [x[b, h, t] * D**-0.25 for t in range(T)]
            z = [[torch.einsum("d,d->", Omega[j], scaled[t]) for j in range(r)] for t in range(T)]
            for t in range(T):
                top = 0.0
                if stabilise and is_query:
                    top = torch.stack(z[t]).max()
                elif stabilise:
                    top = torch.stack([z[s][j] for s in range(T) for j in range(r)]).max()
                half = torch.einsum("d,d->", scaled[t], scaled[t]) / 2
                for j in range(r):
                    out.append((torch.exp(z[t][j] - half - top) + eps) / math.sqrt(r))
    return torch.stack(out).reshape(B, H, T, r)


def naive_relu_features(x, Omega=None, kernel_eps=1e-3, c=None):
    """relu(Omega c x) + kernel_eps; c = D^(-1/4) unless given; without Omega the D inputs are the features."""
    B, H, T, D = x.shape
    c = D**-0.25 if c is None else c
    r = D if Omega is None else Omega.shape[0]
    out = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                for j in range(r):
                    z = c * (x[b, h, t, j] if Omega is None else torch.einsum("d,d->", Omega[j], x[b, h, t]))
                    out.append((z if z > 0 else z * 0) + kernel_eps)
    return torch.stack(out).reshape(B, H, T, r)


def naive_features_attention(phi_q, phi_k, v, causal=False, prefix_eps=0.0):
    """out_t = sum_s (phi_q(t) . phi_k(s)) v_s / sum_s phi_q(t) . phi_k(s), over s <= t when causal.

    phi_q (B, H, T, r), phi_k (B, H, S, r), v (B, H, S, V) -> (B, H, T, V). `prefix_eps` is added to every feature of
    the sum of keys in the denominator.
    """
    B, H, T, _ = phi_q.shape
    S = phi_k.shape[2]
    rows = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                top = torch.zeros(v.shape[-1], dtype=v.dtype)
                below = prefix_eps * phi_q[b, h, t].sum()
                for s in range(min(t + S - T + 1, S) if causal else S):
                    weight = torch.einsum("r,r->", phi_q[b, h, t], phi_k[b, h, s])
                    top = top + weight * v[b, h, s]
                    below = below + weight
                rows.append(top / below)
    return torch.stack(rows).reshape(B, H, T, -1)


def naive_performer(q, k, v, Omega, causal=False, eps=0.0, prefix_eps=0.0):
    """FAVOR+ with the softmax kernel, given the random matrix. q (B, H, T, D), k (B, H, S, D), v (B, H, S, V), Omega
    (r, D) -> (B, H, T, V)."""
    phi_q = naive_softmax_features(q, Omega, True, eps)
    phi_k = naive_softmax_features(k, Omega, False, eps)
    return naive_features_attention(phi_q, phi_k, v, causal, prefix_eps)


def naive_performer_relu(q, k, v, Omega=None, causal=False, kernel_eps=1e-3, c=None, prefix_eps=0.0):
    """FAVOR+ with the generalised ReLU kernel; shapes as above."""
    phi_q, phi_k = (naive_relu_features(x, Omega, kernel_eps, c) for x in (q, k))
    return naive_features_attention(phi_q, phi_k, v, causal, prefix_eps)


def naive_softmax_kernel(q, k):
    """exp(q_t . k_s / sqrt(D)), which the features estimate without bias.

    q (B, H, T, D), k (B, H, S, D) -> (B, H, T, S).
    """
    B, H, T, D = q.shape
    S = k.shape[2]
    out = [
        torch.exp(torch.einsum("d,d->", q[b, h, t], k[b, h, s]) / math.sqrt(D))
        for b in range(B)
        for h in range(H)
        for t in range(T)
        for s in range(S)
    ]
    return torch.stack(out).reshape(B, H, T, S)


def naive_softmax_attention(q, k, v, causal=False):
    """sum_s exp(q_t . k_s / sqrt(D)) v_s / sum_s exp(q_t . k_s / sqrt(D)), over s <= t when causal."""
    kernel = naive_softmax_kernel(q, k)
    B, H, T, S = kernel.shape
    rows = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = range(min(t + S - T + 1, S) if causal else S)
                below = sum(kernel[b, h, t, s] for s in seen)
                rows.append(sum(kernel[b, h, t, s] * v[b, h, s] for s in seen) / below)
    return torch.stack(rows).reshape(B, H, T, -1)
