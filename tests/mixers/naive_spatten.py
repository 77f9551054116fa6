"""SpAtten, cascade token and head pruning. Equations 1-6 and the released cache rule.

Its author has read neither the code nor its tests.
Largest difference to the golden numbers: 0 (they cover the cache rule only: kept positions equal, no gradients).
Nothing pruned equals plain attention to 4e-16 of its size.
"""

import math

import torch


def linear(x, w, b=None):
    return torch.stack([(row * x).sum() for row in w]) + (0 if b is None else b)


def softmax(scores):
    top = max(float(s.detach()) for s in scores)
    e = [torch.exp(s - top) for s in scores]
    total = sum(e)
    return [x / total for x in e]


def top(values, among, count):
    """The `count` of `among` with the largest values, the lower number first among equals, in order."""
    return sorted(sorted(among, key=lambda i: -float(values[i]))[:count])


def add_token_scores(s, p):
    """Eq. 1. s (B,L1), p (B,H,L0,L1) -> s + sum over heads and queries."""
    return s + torch.stack([sum(one[m, i] for m in range(p.shape[1]) for i in range(p.shape[2])) for one in p])


def add_head_scores(z, e):
    """Eq. 2. z (B,H), e (B,H,L0,D) -> z + sum over queries and channels of |e|."""
    return z + torch.stack([torch.stack([head.abs().sum() for head in sample]) for sample in e])


def keep(score, alive, ratio):
    """Eq. 3. score (B,N), alive (B,N) bool -> the floor(alive (1 - ratio)) best of the alive, at least one."""
    rows = []
    for values, row in zip(score, alive.tolist(), strict=True):
        kept = top(values, [i for i, a in enumerate(row) if a], max(1, math.floor(sum(row) * (1 - ratio) + 1e-9)))
        rows.append([i in kept for i in range(len(row))])
    return torch.tensor(rows)


def local_value_topk(p, ratio, alive=None):
    """Eq. 4. One row of weights p (L1,): the floor(ratio L1) smallest become 0, no renormalisation."""
    among = [j for j in range(len(p)) if alive is None or alive[j]]
    kept = top(p, among, len(among) - math.floor(len(among) * ratio + 1e-9))
    return torch.stack([w if j in kept else torch.zeros_like(w) for j, w in enumerate(p)])


def progressive(q, k, *, bits=(8, 4), threshold=0.1, causal=False):
    """Eq. 5. q (H,T,D), k (H,S,D) -> weights (H,T,S), which rows fetched the low bits (H,T) bool.

    One scale per tensor (not in it): integers of bits[0] + bits[1] bits, the coarse form drops the low bits[1].
    """
    low = 2 ** bits[1]
    units = [x.abs().max() / (2 ** (sum(bits) - 1) - 1) for x in (q, k)]
    whole = [torch.round(x / u) for x, u in zip((q, k), units, strict=True)]
    fine = [x * u for x, u in zip(whole, units, strict=True)]
    coarse = [torch.floor(x / low) * low * u for x, u in zip(whole, units, strict=True)]
    rows, again = [], []
    for h in range(q.shape[0]):
        for t in range(q.shape[1]):
            seen = range(t + 1 + k.shape[1] - q.shape[1] if causal else k.shape[1])
            ways = [[(a[h, t] * b[h, s]).sum() / math.sqrt(q.shape[2]) for s in seen] for a, b in (coarse, fine)]
            again.append(max(float(w) for w in softmax(ways[0])) < threshold)
            w = softmax(ways[again[-1]])
            rows.append(torch.stack(w + [q.new_zeros(())] * (k.shape[1] - len(w))))
    return torch.stack(rows).reshape(*q.shape[:2], -1), torch.tensor(again).reshape(q.shape[:2])


def schedule(layers, target):
    """Eq. 6. Kept share of each layer: 1 in the first max(3, ceil(.15 layers)), then linear to target at the end."""
    first = min(layers, max(3, math.ceil(0.15 * layers)))
    return [1 - (1 - target) * max(0, i + 1 - first) / max(1, layers - first) for i in range(layers)]


def stack(x, layers, *, heads, token_ratio=0.0, head_ratio=0.0, value_ratio=0.0, causal=False, real=None):
    """Eq. 1-4 over layers, mask form. x (B,T,M); layers: list of (wq, wk, wv, wo, ffn or None), residual around each.

    -> x, token scores (B,T), head scores (B,H), alive tokens (B,T), alive heads (B,H). Pruned tokens keep their x.
    """
    batch, length, _ = x.shape
    tokens = torch.ones(batch, length).bool() if real is None else real
    alive = torch.ones(batch, heads).bool()
    s, z = x.new_zeros(batch, length), x.new_zeros(batch, heads)
    for wq, wk, wv, wo, ffn in layers:
        d, outs, mats, heads_out = wq.shape[0] // heads, [], [], []
        for b in range(batch):
            q, k, v = ([linear(row, w).reshape(heads, d) for row in x[b]] for w in (wq, wk, wv))
            for m in range(heads):
                for t in range(length):
                    works = bool(tokens[b, t]) and bool(alive[b, m])
                    seen = [works and bool(tokens[b, j]) and (j <= t or not causal) for j in range(length)]
                    score = [(q[t][m] * k[j][m]).sum() / math.sqrt(d) for j in range(length) if seen[j]]
                    w = iter(softmax(score) if works else [])
                    mats.append(torch.stack([next(w) if sees else x.new_zeros(()) for sees in seen]))
                    cut = local_value_topk(mats[-1], value_ratio, seen)
                    heads_out.append(sum(cut[j] * v[j][m] for j in range(length)))
            for t in range(length):
                y = x[b, t] + linear(torch.cat([heads_out[(b * heads + m) * length + t] for m in range(heads)]), wo)
                outs.append((y if ffn is None else y + ffn(y)) if bool(tokens[b, t]) else x[b, t])
        p, e = (torch.stack(rows).reshape(batch, heads, length, -1) for rows in (mats, heads_out))
        x, s, z = torch.stack(outs).reshape(x.shape), add_token_scores(s, p), add_head_scores(z, e)
        tokens, alive = keep(s, tokens, token_ratio), keep(z, alive, head_ratio)
    return x, s, z, tokens, alive


def cache_keep(scores, *, start, recent, important, coming):
    """The released rule. scores (B,H,Q,S) raw q k / sqrt(D) before the mask -> kept positions, a list per head."""
    length, end, kept = scores.shape[3], scores.shape[3] - recent + coming, []
    for h in range(scores.shape[1]):
        total = [sum(float(x) for x in scores[:, h, :, j].flatten()) for j in range(length)]
        kept.append([*range(start), *top(total, range(start, end), important), *range(end, length)])
    return kept
