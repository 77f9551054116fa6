"""One shared projection and an embedding a head, number by number, written from its equations before the module."""

import math

import torch


def naive_head_embeddings(x, p, *, form, context=None, allowed=None):
    """x (B, T, M), context (B, S, M) -> (B, T, M). `p` holds tensors by name; allowed (B, T, S)."""
    context = x if context is None else context
    heads, width = p["q_embedding"].shape

    def one(name, row, h):
        bias = p.get(f"{name}_proj.bias")
        shared = p[f"{name}_proj.weight"] @ row + (0 if bias is None else bias)
        mine = p[f"{name}_embedding"][h]
        return torch.stack([s + e if form == "add" else s * (1 + e) for s, e in zip(shared, mine, strict=True)])

    out = []
    for b in range(len(x)):
        rows = []
        for t in range(x.shape[1]):
            seen = [s for s in range(context.shape[1]) if allowed is None or allowed[b, t, s]]
            mixed = []
            for h in range(heads):
                q = one("q", x[b, t], h)
                scores = [torch.dot(q, one("k", context[b, s], h)) / math.sqrt(width) for s in seen]
                top = max((z.item() for z in scores), default=0.0)
                grown = [torch.exp(z - top) for z in scores]
                o = torch.zeros(width, dtype=x.dtype)
                for s, e in zip(seen, grown, strict=True):
                    o = o + e / sum(grown) * one("v", context[b, s], h)
                mixed.append(o)
            bias = p.get("o_proj.bias")
            rows.append(p["o_proj.weight"] @ torch.cat(mixed) + (0 if bias is None else bias))
        out.append(torch.stack(rows))
    return torch.stack(out)
