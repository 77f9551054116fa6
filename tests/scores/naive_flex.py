"""FlexAttention's programming model as plain loops.

The author of this file saw neither the implementation nor its tests: it was
written from the equation sheet of arXiv 2412.05496 and the public
documentation of torch.nn.attention.flex_attention alone.

    y[b,h,t] = sum_s p[b,h,t,s] v[b,h',s],   h' = h // (H / G)
    p        = softmax over the allowed s of f(scale q.k, b, h, t, s)

f (``score_mod``) sees the scaled score in natural units; a pair that is not
allowed by ``mask_mod`` or by ``causal`` takes no part, whatever f says of it.
A query without keys has y = 0 and log-sum-exp -inf. Indices count from 0 in
the tensors given; ``causal`` is bottom-right, s <= t + (S - T).
"""

import torch

F64 = torch.float64


def naive_flex(q, k, v, score_mod=None, mask_mod=None, *, causal=False, scale=None):
    """(B,H,T,D), (B,G,S,D), (B,G,S,V) in float64 -> y (B,H,T,V), lse (B,H,T)."""
    if not q.dtype == k.dtype == v.dtype == F64:
        raise TypeError("the loops are in float64")
    (B, H, T, D), (G, S, V) = q.shape, v.shape[1:]
    if H % G:
        raise ValueError(f"{H} heads over {G}")
    scale = D**-0.5 if scale is None else scale
    idx = [torch.tensor(i) for i in range(max(B, H, T, S))]  # 0-d, as in torch
    ys, ls = [], []
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for t in range(T):
                scores, values = [], []
                for s in range(S):
                    if causal and s > t + (S - T):
                        continue
                    at = idx[b], idx[h], idx[t], idx[s]
                    if mask_mod is not None and not bool(mask_mod(*at)):
                        continue
                    x = scale * (q[b, h, t] * k[b, g, s]).sum()
                    if score_mod is not None:
                        x = score_mod(x, *at)
                    scores.append(x)
                    values.append(v[b, g, s])
                if not scores:
                    ys.append(torch.zeros(V, dtype=F64))
                    ls.append(torch.tensor(-torch.inf, dtype=F64))
                    continue
                top = max(x.item() for x in scores)
                e = [torch.exp(x - top) for x in scores]
                z = sum(e)
                ys.append(sum(w * u for w, u in zip(e, values, strict=True)) / z)
                ls.append(torch.log(z) + top)
    return torch.stack(ys).reshape(B, H, T, V), torch.stack(ls).reshape(B, H, T)
