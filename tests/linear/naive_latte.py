"""Naive Latte: attention through latent variables."""

import torch


def naive_latte(a, b, v, causal=False, keep=None):
    """y_t = sum_l p(l|t) sum_s p(s|l) v_s (arXiv 2402.17512), per head.

    p(l|t) = softmax over the latents l of a_t; p(s|l) = exp(b_sl) / sum_s' exp(b_s'l) over all positions, or over
    s' <= t when causal (one denominator per latent and t). a (B, H, T, L), b (B, H, S, L), v (B, H, S, V), L latents
    per head; keep (B, S) bool, True = a real token -> (B, H, T, V). No scale.
    """
    B, H, T, L = a.shape
    S, V = v.shape[2:]
    rows = []
    for n in range(B):
        for h in range(H):
            for t in range(T):
                top = a[n, h, t].max().item()
                p = [torch.exp(a[n, h, t, l] - top) for l in range(L)]
                p_sum = sum(p)
                seen = [s for s in range(min(t + S - T + 1, S) if causal else S) if keep is None or keep[n, s]]
                y = torch.zeros(V, dtype=v.dtype)
                for l in range(L):
                    if not seen:
                        continue
                    peak = max(b[n, h, s, l].item() for s in seen)
                    weights = [torch.exp(b[n, h, s, l] - peak) for s in seen]
                    total = sum(weights)
                    for weight, s in zip(weights, seen, strict=True):
                        y = y + p[l] / p_sum * weight / total * v[n, h, s]
                rows.append(y)
    return torch.stack(rows).reshape(B, H, T, V)


def naive_latte_weights(a, b, causal=False):
    """The implied attention matrix A_ts = sum_l p(l|t) p(s|l[, t]), (B, H, T, S): `naive_latte` with v = identity."""
    B, H, S, _ = b.shape
    return naive_latte(a, b, torch.eye(S, dtype=a.dtype).expand(B, H, S, S), causal)
