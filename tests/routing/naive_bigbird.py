"""BigBird for given random blocks, in loops; the author saw the formulas only, neither code nor tests."""

import math

import torch

from naive import may, softmax


def key_blocks(i, n, random=()):
    """Blocks (a list, random ones at the end) that query block i of n sees."""
    if i in (0, n - 1):
        return list(range(n))
    return sorted({0, i - 1, i, i + 1, n - 1}) + list(random)


def legal_random(i, n):
    """Blocks that may be drawn for block row i (eq. 2 and 4); none for the global rows."""
    if i in (0, n - 1):
        return []
    out = []
    for c in range(n):
        if c in (0, n - 1, i - 1, i, i + 1) or (i == 1 and c == n - 2) or (i == n - 2 and c == 1):
            continue
        out.append(c)
    return out


def draw_plan(n, r):
    """Eq. 5, other lengths than 1024, 3072, 4096: list of (how many, first block, end block)."""
    if n > 2 * r + 5:
        return [(r, 0, 2 * r + 5)]
    if n > r + 5:
        return [(r // 2, 0, r + 5), (r - r // 2, r + 5, n)]
    return [(r, 0, n)]


def allowed(length, block, random):
    """random[h][i]: the random blocks of head h and block row i (rows 0 and n-1 ignored) -> bool (H,T,T)."""
    n = length // block
    return torch.tensor(
        [
            [[j // block in key_blocks(i // block, n, rows[i // block]) for j in range(length)] for i in range(length)]
            for rows in random
        ]
    )


def bigbird(q, k, v, block, random, keep=None, multiset=False, penalty=None):
    """q, k (B,H,T,D), v (B,H,T,V) -> (B,H,T,V); one softmax over the union.

    multiset: a block listed twice counts twice (the code read for the account).
    keep (B,T): padded keys are left out (penalty None) or get `penalty` added; padded queries give 0.
    """
    batch, heads, length, d = q.shape
    n = length // block
    outs = []
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                row = key_blocks(i // block, n, random[h][i // block])
                seen, logits, y = [], [], torch.zeros(v.shape[3], dtype=q.dtype)
                for c in row if multiset else sorted(set(row)):
                    for j in range(c * block, (c + 1) * block):
                        real = keep is None or bool(keep[b, j])
                        if real or penalty is not None:
                            seen.append(j)
                            logits.append((q[b, h, i] * k[b, h, j]).sum() / math.sqrt(d) + (0.0 if real else penalty))
                if seen and (keep is None or bool(keep[b, i])):
                    for w, j in zip(softmax(logits), seen, strict=True):
                        y = y + w * v[b, h, j]
                outs.append(y)
    return torch.stack(outs).reshape(batch, heads, length, -1)


def dense(q, k, v, mask):
    """Plain attention under a (H,T,T) mask, for the claim."""
    out = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                seen = [j for j in range(k.shape[2]) if may(mask[h], b, i, j)]
                a = softmax([(q[b, h, i] * k[b, h, j]).sum() / math.sqrt(q.shape[3]) for j in seen])
                out.append(sum(w * v[b, h, j] for w, j in zip(a, seen, strict=True)))
    return torch.stack(out).reshape(*q.shape[:3], -1)


# Doubts: eq. 5 does not say what happens to rows whose pool (first blocks minus window) is short of legal blocks; the
# shares of the middle plan for odd r are read as r // 2 and r - r // 2. Drawing (seed, generator) is left out, as are
# the lengths 1024, 3072, 4096. No golden numbers here (held out).
