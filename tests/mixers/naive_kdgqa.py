"""Key-driven, dynamic and perturbed grouped-query attention in loops: written from the equations by somebody who saw
neither the code nor the tests.

Lengths are of keys after their bias, over all tokens or those of `keep`. Where nothing tells key heads apart, each
serves H / G, what is left over going to the first. `picks` are the indices that random repair draws, in order. The
number set to 0 counts in the statistics of its row of noise. Weights are (out, in); head h owns rows h D to (h + 1) D.
"""

import torch

from naive import linear, may, softmax


def head_map(allocation):
    """head h -> key/value head; consecutive blocks."""
    return [i for i, a in enumerate(allocation) for _ in range(int(a))]


def uniform_allocation(H, G):
    return [H // G + (1 if i < H % G else 0) for i in range(G)]


def key_norms(k, keep=None):
    """k: nested k[b][t] of (G, D) tensors or a (B,T,G,D) tensor -> list of G floats (no gradient)."""
    B, T, G, _ = k.shape
    k = k.detach()
    norms = []
    for i in range(G):
        n = k.new_zeros(())
        for b in range(B):
            square = k.new_zeros(())
            for t in range(T):
                if keep is None or bool(keep[b][t]):
                    square = square + (k[b, t, i] ** 2).sum()
            n = n + torch.sqrt(square)
        norms.append(n)
    return norms


def _round(value):
    return round(float(value))  # python rounds half to even


def kdgqa_allocation(norms, H):
    G = len(norms)
    low, high = min(norms), max(norms)
    if float(high - low) == 0.0:
        return uniform_allocation(H, G)
    m = [(n - low) / (high - low) for n in norms]
    total = sum(m[1:], m[0])
    a = [_round(H * z / total) for z in m]
    while sum(a) > H:
        a[a.index(max(a))] -= 1
    while sum(a) < H:
        a[a.index(min(a))] += 1
    return a


def dgqa_allocation(norms, cache, H, mode, picks=()):
    """mode: diff | ema. picks: random indices for the repair."""
    G = len(norms)
    if mode == "diff":
        z = [abs(c - n) for c, n in zip(cache, norms)]
    else:
        z = [0.9 * n + 0.1 * c for c, n in zip(cache, norms)]
    total = sum(z[1:], z[0])
    if float(total) == 0.0:
        return uniform_allocation(H, G)
    a = [_round(H * v / total) for v in z]
    picks = iter(picks)
    while sum(a) > H:
        i = next(picks)
        if a[i] > 0:
            a[i] -= 1
    while sum(a) < H:
        a[next(picks)] += 1
    return a


def dgqa_step(norms, cache, split, H, mode, step, window, training=True, picks=()):
    """-> (split used in this forward, cache afterwards)."""
    if training:
        if step % window != 0:
            return split, cache
        new = dgqa_allocation(norms, cache, H, mode, picks)
        return new, [(c + n) / window for c, n in zip(cache, norms)]
    return dgqa_allocation(norms, cache, H, mode, picks), list(norms)


def keys(x, Wk, bk, G):
    B, T, _ = x.shape
    return torch.stack([torch.stack([linear(x[b, t], Wk, bk).reshape(G, -1) for t in range(T)]) for b in range(B)])


def head_outputs(x, Wq, Wk, Wv, bq, bk, bv, H, G, allocation, allowed=None):
    """Y[b][h] (T, D) before the output map."""
    D = Wq.shape[0] // H
    owner = head_map(allocation)
    k, v = keys(x, Wk, bk, G), keys(x, Wv, bv, G)
    batch = []
    for b in range(x.shape[0]):
        q = [linear(x[b, t], Wq, bq) * D**-0.5 for t in range(x.shape[1])]
        per_head = []
        for h in range(H):
            g = owner[h]
            rows = []
            for i in range(x.shape[1]):
                js = [j for j in range(x.shape[1]) if may(allowed, b, i, j)]
                if not js:
                    rows.append(v.new_zeros(v.shape[-1]))
                    continue
                p = softmax([(q[i][h * D : (h + 1) * D] * k[b, j, g]).sum() for j in js])
                y = v.new_zeros(v.shape[-1])
                for w, j in zip(p, js):
                    y = y + w * v[b, j, g]
                rows.append(y)
            per_head.append(torch.stack(rows))
        batch.append(per_head)
    return batch


def _join(Y, Wo, bo):
    batch = []
    for per_head in Y:
        T = per_head[0].shape[0]
        batch.append(torch.stack([linear(torch.cat([y[t] for y in per_head]), Wo, bo) for t in range(T)]))
    return torch.stack(batch)


def gqa(
    x, Wq, Wk, Wv, Wo, *, num_heads, num_kv_heads, allocation=None, bq=None, bk=None, bv=None, bo=None, allowed=None
):
    if allocation is None:
        allocation = [num_heads // num_kv_heads] * num_kv_heads
    Y = head_outputs(x, Wq, Wk, Wv, bq, bk, bv, num_heads, num_kv_heads, allocation, allowed)
    return _join(Y, Wo, bo)


def kdgqa(x, Wq, Wk, Wv, Wo, *, num_heads, num_kv_heads, bq=None, bk=None, bv=None, bo=None, allowed=None, keep=None):
    """-> out, allocation"""
    norms = key_norms(keys(x, Wk, bk, num_kv_heads), keep)
    a = kdgqa_allocation(norms, num_heads)
    out = gqa(
        x,
        Wq,
        Wk,
        Wv,
        Wo,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        allocation=a,
        bq=bq,
        bk=bk,
        bv=bv,
        bo=bo,
        allowed=allowed,
    )
    return out, a


def dgqa(
    x,
    Wq,
    Wk,
    Wv,
    Wo,
    *,
    num_heads,
    num_kv_heads,
    mode,
    cache,
    split,
    step=0,
    window=1,
    training=True,
    picks=(),
    bq=None,
    bk=None,
    bv=None,
    bo=None,
    allowed=None,
    keep=None,
):
    """-> out, split, cache after"""
    norms = key_norms(keys(x, Wk, bk, num_kv_heads), keep)
    split, cache = dgqa_step(norms, cache, split, num_heads, mode, step, window, training, picks)
    out = gqa(
        x,
        Wq,
        Wk,
        Wv,
        Wo,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        allocation=split,
        bq=bq,
        bk=bk,
        bv=bv,
        bo=bo,
        allowed=allowed,
    )
    return out, split, cache


def _mean_std(values):
    n = len(values)
    mean = sum(values[1:], values[0]) / n
    var = sum(((u - mean) ** 2 for u in values[1:]), (values[0] - mean) ** 2) / (n - 1)
    return mean, torch.sqrt(var)


def pgqa(x, Wq, Wk, Wv, Wo, uniform, *, num_heads, num_kv_heads, bq=None, bk=None, bv=None, bo=None, allowed=None):
    """uniform (G, R, T*D): the raw draws in [0, 1)."""
    G, R = num_kv_heads, num_heads // num_kv_heads
    Y = head_outputs(x, Wq, Wk, Wv, bq, bk, bv, num_heads, G, [R] * G, allowed)
    changed = []
    for per_head in Y:
        new = []
        for g in range(G):
            for r in range(R):
                y = per_head[g * R + r]
                flat = [y[t, d] for t in range(y.shape[0]) for d in range(y.shape[1])]
                u = [uniform.new_zeros(()) if e == r else uniform[g, r, e] for e in range(len(flat))]
                mu, su = _mean_std(u)
                if float(su) == 0.0:
                    su = torch.ones_like(su)
                u = [(w - mu) / su for w in u]
                my, sy = _mean_std(flat)
                flat = [f - (w * sy + my) for f, w in zip(flat, u)]
                new.append(torch.stack(flat).reshape(y.shape))
        changed.append(new)
    return _join(changed, Wo, bo)


def pool_heads(weight, H, G):
    """up-training: (H*D, M) weight or (H*D,) bias -> mean of consecutive groups of H/G heads, (G*D, M)."""
    D, R = weight.shape[0] // H, H // G
    rows = []
    for g in range(G):
        for d in range(D):
            total = weight[g * R * D + d]
            for r in range(1, R):
                total = total + weight[(g * R + r) * D + d]
            rows.append(total / R)
    return torch.stack(rows)
