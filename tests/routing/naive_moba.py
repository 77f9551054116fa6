"""MoBA written out (arXiv 2502.13189, equations 2-6): which blocks a query reads, and one softmax over them."""

import torch


def naive_moba_blocks(q, k, block, topk):
    """q (B,H,T,D), k (B,G,S,D), T <= S -> bool (B,H,T,n): the blocks that each query reads.

    Query head h reads key head h // (H/G) and has a gate of its own. Query t stands at key position t + S - T. Its own
    block is always read and counts in topk; blocks ahead of it are never read; affinity = q . mean of the block's keys.
    """
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1], k.shape[2]
    count = -(-keys // block)
    kept = torch.zeros(batch, heads, queries, count, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            source = k[b, h // (heads // groups)]
            for t in range(queries):
                current = (t + keys - queries) // block
                affinity = []
                for i in range(current):
                    members = [source[j] for j in range(i * block, (i + 1) * block)]
                    affinity.append((float(torch.dot(q[b, h, t], sum(members) / block)), i))
                affinity.sort(key=lambda pair: -pair[0])
                kept[b, h, t, current] = True
                for _, i in affinity[: topk - 1]:
                    kept[b, h, t, i] = True
    return kept


def naive_moba(q, k, v, block, topk, scale=None):
    """q (B,H,T,D), k (B,G,S,D), v (B,G,S,V) -> (B,H,T,V): softmax attention over the keys j <= t of the chosen blocks.

    The choice of blocks carries no gradient. scale defaults to D^-1/2 (the authors' code; equation 2 leaves it out).
    """
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1], k.shape[2]
    scale = width**-0.5 if scale is None else scale
    kept = naive_moba_blocks(q.detach(), k.detach(), block, topk)
    rows = []
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for t in range(queries):
                place = t + keys - queries
                seen = [j for j in range(keys) if j <= place and kept[b, h, t, j // block]]
                scores = [scale * torch.dot(q[b, h, t], k[b, g, j]) for j in seen]
                top = max(s.item() for s in scores)
                weights = [torch.exp(s - top) for s in scores]
                total = sum(weights)
                rows.append(sum(w / total * v[b, g, j] for w, j in zip(weights, seen, strict=True)))
    return torch.stack(rows).reshape(batch, heads, queries, v.shape[-1])
