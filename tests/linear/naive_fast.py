"""Naive FAST (Fastmax): attention with a polynomial kernel, from its explicit matrix."""

import torch


def naive_fast_normalise(x, lim=1.0, center=False, per_token=False):
    """lim x_t / max_s |x_s|, the max over all tokens of the (batch, head); center first takes every token's mean over
    its features away; per_token divides by the token's own norm instead. x (B, H, T, D) -> the same shape."""
    B, H, T, D = x.shape
    out = []
    for b in range(B):
        for h in range(H):
            tokens = [x[b, h, t] for t in range(T)]
            if center:
                tokens = [token - sum(token[d] for d in range(D)) / D for token in tokens]
            norms = [torch.sqrt(torch.einsum("d,d->", token, token)) for token in tokens]
            if not per_token:
                norms = [torch.stack(norms).max()] * T
            out += [lim * token / norm for token, norm in zip(tokens, norms, strict=True)]
    return torch.stack(out).reshape(B, H, T, D)


def naive_fast(q, k, v, p=2, causal=False, coefficients=(1.0, 1.0, 0.5), temperature=1.0):
    """out_t = sum_s f(s_ts) v_s / sum_s f(s_ts), s_ts = q_t . k_s / temperature (arXiv 2402.07901).

    f(s) = a0 + a1 s + a2 s^2 for p = 2, a0 + a1 s for p = 1; over s <= t when causal. q and k as given: normalise them
    before (`naive_fast_normalise`). q (B, H, T, D), k (B, H, S, D), v (B, H, S, V) -> (B, H, T, V).
    """
    B, H, T, _ = q.shape
    S = k.shape[2]
    rows = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                top = torch.zeros(v.shape[-1], dtype=v.dtype)
                below = torch.zeros((), dtype=v.dtype)
                for s in range(min(t + S - T + 1, S) if causal else S):
                    score = torch.einsum("d,d->", q[b, h, t], k[b, h, s]) / temperature
                    f = sum(coefficients[power] * score**power for power in range(p + 1))
                    top, below = top + f * v[b, h, s], below + f
                rows.append(top / below)
    return torch.stack(rows).reshape(B, H, T, -1)
