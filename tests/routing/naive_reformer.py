"""Oracle S-reformer: LSH attention with shared query and key. Equations 1-6 of the account and the paper's two options.

Written from the account alone; its author has read neither the code nor its tests. Largest difference to the golden
numbers: values 2.7e-15, gradients 1.3e-14 (case b, account's trap 1: 9.5e-13 and 1.0e-12); all buckets equal.
"""

import math

import torch


def linear(z, w):
    return torch.stack([(row * z).sum() for row in w])


def make_key(z):
    """Eq. 1: the key of a query vector."""
    return z / torch.sqrt((z**2).mean() + 1e-6) / math.sqrt(len(z))


def bucket_of(z, rotation, buckets):
    """Eq. 2. rotation (D, columns), buckets int or pair; no gradient."""
    parts = [buckets] if isinstance(buckets, int) else list(buckets)
    number, factor, column = 0, 1, 0
    for n in parts:
        turned = [float((z.detach() * rotation[:, column + c]).sum()) for c in range(n // 2)]
        both = turned + [-t for t in turned]
        number += factor * both.index(max(both))
        factor, column = factor * n, column + n // 2
    return number


def hash_head(z, rotations, buckets, keep=None):
    """z (T,D), rotations (D,rounds,columns), keep (T,) -> list over rounds of lists of T buckets (no round offset)."""
    extra = buckets if isinstance(buckets, int) else math.prod(buckets)
    out = []
    for r in range(rotations.shape[1]):
        row = [bucket_of(z[t], rotations[:, r], buckets) for t in range(len(z))]
        out.append([n if keep is None or bool(keep[t]) else extra for t, n in enumerate(row)])
    return out


def windows(hashes, chunk, before, after):
    """Eq. 3 -> dict (round, token) -> list of (round, token) of the keys in its window, all rounds in one circle."""
    places = [(r, n, t) for r, row in enumerate(hashes) for t, n in enumerate(row)]
    order = [(r, t) for r, _, t in sorted(places)]
    chunks = [order[i : i + chunk] for i in range(0, len(order), chunk)]
    out = {}
    for c, members in enumerate(chunks):
        keys = [p for step in range(-before, after + 1) for p in chunks[(c + step) % len(chunks)]]
        for place in members:
            out[place] = keys
    return out


def allowed(i, j, keep, causal):
    return (keep is None or bool(keep[j])) and not (causal and j > i)


def attend(i, keys, z, k, v, minus):
    """Eq. 4 with a proper mask: self only where nothing else is allowed. keys: allowed token numbers, repeats count.

    minus: function (i, j) -> number taken off the logit. -> output, logsumexp (None: only self was there).
    """
    others = [j for j in keys if j != i]
    if not others:
        return v[i], None
    logits = torch.stack([(z[i] * k[j]).sum() - minus(i, j) for j in others])
    top = logits.detach().max()
    lse = torch.log(torch.exp(logits - top).sum()) + top
    return sum(torch.exp(s - lse) * v[j] for s, j in zip(logits, others, strict=True)), lse


def reformer_head(z, v, rotations, *, buckets, chunk, before=1, after=0, causal=False, keep=None, same_bucket=False,
                  exclude_duplicates=False):  # fmt: skip
    """One head of one sample. z, v (T,.), rotations (D,rounds,columns), keep (T,) -> (T,V)."""
    length = len(z)
    k = [make_key(z[t]) for t in range(length)]
    if length <= chunk:  # eq. 6
        every = [[j for j in range(length) if allowed(i, j, keep, causal)] for i in range(length)]
        return torch.stack([attend(i, every[i], z, k, v, lambda i, j: 0.0)[0] for i in range(length)])
    hashes = hash_head(z, rotations, buckets, keep)
    near = windows(hashes, chunk, before, after)
    lists = {}
    for (r, i), keys in near.items():
        lists[r, i] = [
            j for q, j in keys
            if allowed(i, j, keep, causal) and (not same_bucket or (q == r and hashes[q][j] == hashes[r][i]))
        ]  # fmt: skip
    rounds, outs = len(hashes), []

    def minus(i, j):
        if not exclude_duplicates:
            return 0.0
        return math.log(sum(lists[r, i].count(j) for r in range(rounds)))

    for i in range(length):
        parts = [attend(i, lists[r, i], z, k, v, minus) for r in range(rounds)]
        parts = [(o, lse) for o, lse in parts if lse is not None]
        if not parts:
            outs.append(v[i])
            continue
        w = torch.stack([lse for _, lse in parts]).softmax(0)  # eq. 5
        outs.append(sum(a * o for a, (o, _) in zip(w, parts, strict=True)))
    return torch.stack(outs)


def reformer(x, wqk, wv, rotations, *, heads, keep=None, **options):
    """x (B,T,M), wqk, wv (H*D,M), rotations (H,D,rounds,columns), keep (B,T) -> (B,T,H*D), before the output map."""
    outs = []
    for b in range(x.shape[0]):
        z, v = (torch.stack([linear(r, w) for r in x[b]]).reshape(x.shape[1], heads, -1) for w in (wqk, wv))
        on = None if keep is None else keep[b]
        each = [reformer_head(z[:, h], v[:, h], rotations[h], keep=on, **options) for h in range(heads)]
        outs.append(torch.cat(each, dim=1))
    return torch.stack(outs)


# Doubt: exclude_duplicates: N = how often i attends to j over all rounds, repeats in a window counted.
