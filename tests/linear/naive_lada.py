"""Ladaformer's linear additive attention and its two blocks, by loops.

Their author has read neither code nor test of the library.
"""

import math

import torch

from naive import linear, softmax


def gelu(z):
    return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))


def norm(vec, weight=None, bias=None, eps=1e-5):
    d = vec - vec.mean()
    y = d / torch.sqrt((d**2).mean() + eps)
    return y if weight is None else y * weight + bias


def lada_attention(q, k, v, scores, *, keep=None, causal=False):
    """q, k, v (B,H,T,D), scores (B,H,T) before the 1/sqrt(D) -> out (B,H,T,D), a (B,H,T) or (B,H,T,T) if causal.

    keep (B,T): padding out of the softmax; causal: a running softmax average (both inferred; their code has no mask).
    """
    batch, heads, length, d = q.shape
    outs, ws = [], []
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                seen = [s for s in range(t + 1 if causal else length) if keep is None or bool(keep[b, s])]
                a = softmax([scores[b, h, s] / math.sqrt(d) for s in seen]) if seen else []
                g = sum((w * q[b, h, s] for w, s in zip(a, seen, strict=True)), torch.zeros_like(q[b, h, 0]))
                outs.append(g * k[b, h, t] * v[b, h, t])
                row = dict(zip(seen, a, strict=True))
                ws.append(torch.stack([row.get(s, q.new_zeros(())) for s in range(length)]))
    a = torch.stack(ws).reshape(batch, heads, length, length)
    return torch.stack(outs).reshape(q.shape), a if causal else a[:, :, 0]


def mixer(x, p, heads, *, keep=None, causal=False):
    """x (B,T,M); p: parameters by the authors' names (to_qkv_weight, ...) -> out (B,T,M), a."""
    batch, length, _ = x.shape
    rows = [linear(x[b, t], p["to_qkv_weight"], p["to_qkv_bias"]) for b in range(batch) for t in range(length)]
    q, k, v = torch.stack(rows).reshape(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    full = [q[b, :, t].reshape(-1) for b in range(batch) for t in range(length)]
    s = torch.stack([linear(r, p["q_attn_weight"], p["q_attn_bias"]) for r in full])
    o, a = lada_attention(q, k, v, s.reshape(batch, length, heads).transpose(1, 2), keep=keep, causal=causal)
    flat = [o[b, :, t].reshape(-1) for b in range(batch) for t in range(length)]
    return torch.stack([linear(r, p["to_out_weight"], p["to_out_bias"]) for r in flat]).reshape(x.shape), a


def under(p, start):
    return {n[len(start) :]: a for n, a in p.items() if n.startswith(start)}


def mlp(row, p):
    return linear(gelu(linear(row, p["mlp_0_weight"], p["mlp_0_bias"])), p["mlp_2_weight"], p["mlp_2_bias"])


def each(f, x):
    return torch.stack([torch.stack([f(x[b, t], b) for t in range(x.shape[1])]) for b in range(x.shape[0])])


def ladaformer(x, p, heads, eps=1e-5):
    """With two residuals."""
    x = x + mixer(each(lambda r, b: norm(r, p["ln_1_weight"], p["ln_1_bias"], eps), x), under(p, "attn_"), heads)[0]
    return x + each(lambda r, b: mlp(norm(r, p["ln_2_weight"], p["ln_2_bias"], eps), p), x)


def modulated(row, z, p, eps=1e-6):
    h = torch.clamp(linear(z, p["h_0_weight"], p["h_0_bias"]), min=0)
    gamma = linear(h, p["mlp_gamma_weight"], p["mlp_gamma_bias"])
    return norm(row, eps=eps) * gamma + linear(h, p["mlp_beta_weight"], p["mlp_beta_bias"])


def sm_ladaformer(x, z, p, heads):
    """z (B,Z): no second residual."""
    x = x + mixer(each(lambda r, b: modulated(r, z[b], under(p, "ln_1_")), x), under(p, "attn_"), heads)[0]
    return each(lambda r, b: mlp(modulated(r, z[b], under(p, "ln_2_")), p), x)
