"""Choosing which cached keys to keep, in plain loops. Its author saw only an account of the papers and of kvpress,
neither this library's code nor its tests.

q (B, H, S, D), k and v (B, G, S, D) after rotation; weights (B, H, S, S) causal softmax rows; scores (B, G, S).
"""

import math

import torch


def num(x):
    """the bare number in a scalar tensor."""
    return x.detach().item() if torch.is_tensor(x) else float(x)


def softmax(scores):
    """list of scalars -> list of scalars that sum to 1."""
    top = max(num(s) for s in scores)
    e = [torch.exp(s - top) for s in scores]
    total = sum(e[1:], e[0])
    return [x / total for x in e]


def dot(a, b):
    s = a[0] * b[0]
    for m in range(1, len(a)):
        s = s + a[m] * b[m]
    return s


def table(rows, B, G, S):
    """rows[b][g] = list of S scalars -> (B,G,S)."""
    return torch.stack(
        [
            torch.stack([r if torch.is_tensor(r) else torch.as_tensor(r, dtype=torch.float64) for r in rows[b][g]])
            for b in range(B)
            for g in range(G)
        ]
    ).reshape(B, G, S)


def above_all(rows):
    """the largest score anywhere (whole batch) + 1: a score that is always kept."""
    return max(num(x) for b in rows for g in b for x in g) + 1


def causal_weights(q, k):
    """q (B,H,S,D), k (B,G,S,D) -> weights (B,H,S,S)."""
    B, H, S, D = q.shape
    G = k.shape[1]
    out = []
    for b in range(B):
        for h in range(H):
            for i in range(S):
                p = softmax([dot(q[b, h, i], k[b, h // (H // G), j]) / D**0.5 for j in range(i + 1)])
                out.append(torch.stack(p + [p[0] * 0] * (S - i - 1)))
    return torch.stack(out).reshape(B, H, S, S)


def snapkv(weights, num_kv_heads, window=64, kernel=5, reduce="mean", pooling="avg"):
    """1. reduce over the last `window` queries of their weights to the keys before them (softmax over ALL visible
    keys), pool over keys (odd kernel, zero padding counted), mean over the group; the window itself: max + 1.
    Paper (recalled): reduce "sum", pooling "max" or "avg", kernel 7. # OPEN: padding of the max pool (nothing here)."""
    B, H, S, _ = weights.shape
    G, n = num_kv_heads, S - window
    rows = []
    for b in range(B):
        per_head = []
        for h in range(H):
            a = [sum(weights[b, h, i, j] for i in range(n, S)) for j in range(n)]
            if reduce == "mean":
                a = [x / window for x in a]
            pooled = []
            for j in range(n):
                near = [a[m] for m in range(j - kernel // 2, j + kernel // 2 + 1) if 0 <= m < n]
                pooled.append(sum(near) / kernel if pooling == "avg" else max(near, key=num))
            per_head.append(pooled)
        rows.append(
            [
                [sum(per_head[h][j] for h in range(g * (H // G), (g + 1) * (H // G))) / (H // G) for j in range(n)]
                for g in range(G)
            ]
        )
    top = above_all(rows)
    return table([[r + [top] * window for r in b] for b in rows], B, G, S)


def h2o(weights, num_kv_heads, normalise=True):
    """2. sum over all queries / number of queries that could see the key (S - j), mean over the group.
    normalise False: the running SUM of H2O itself (recalled)."""
    B, H, S, _ = weights.shape
    G = num_kv_heads
    rows = [
        [
            [
                sum(weights[b, h, i, j] for h in range(g * (H // G), (g + 1) * (H // G)) for i in range(j, S))
                / (H // G)
                / ((S - j) if normalise else 1)
                for j in range(S)
            ]
            for g in range(G)
        ]
        for b in range(B)
    ]
    return table(rows, B, G, S)


def tova(weights, num_kv_heads):
    """3. weights of the last query, mean over ALL heads, the same for every key head; the last key: max + 1."""
    B, H, S, _ = weights.shape
    rows = []
    for b in range(B):
        r = [sum(weights[b, h, S - 1, j] for h in range(H)) / H for j in range(S - 1)]
        rows.append([r for _ in range(num_kv_heads)])
    top = above_all(rows)
    return table([[r + [top] for r in b] for b in rows], B, num_kv_heads, S)


def streaming(B, num_kv_heads, S, ratio, sinks=4):
    """4. score 0 for the n_pruned keys after the sinks, 1 elsewhere; n_pruned = S - int(S (1 - ratio))."""
    pruned = S - int(S * (1 - ratio))
    r = [0.0 if sinks <= j < sinks + pruned else 1.0 for j in range(S)]
    return table([[r for _ in range(num_kv_heads)] for _ in range(B)], B, num_kv_heads, S)


def norm(x):
    return torch.sqrt(sum(x[m] * x[m] for m in range(len(x))))


def key_norm(k):
    """5. -|k_j|. k (B,G,S,D)."""
    B, G, S, _ = k.shape
    return table([[[-norm(k[b, g, j]) for j in range(S)] for g in range(G)] for b in range(B)], B, G, S)


def keydiff(k):
    """5. -cos(k_j, a), a = mean over j of k_j / |k_j|."""
    B, G, S, _ = k.shape
    rows = []
    for b in range(B):
        per = []
        for g in range(G):
            a = sum(k[b, g, j] / norm(k[b, g, j]) for j in range(S)) / S
            per.append([-dot(k[b, g, j], a) / (norm(k[b, g, j]) * norm(a)) for j in range(S)])
        rows.append(per)
    return table(rows, B, G, S)


def rope_tables(positions, D, base=10000.0, float32_frequencies=False):
    """cos, sin (n,D): angle of entry a = position * base^(-2 (a mod D/2)/D) (halves).
    float32_frequencies: the frequencies rounded to float32 first, as the golden numbers' host model stores them."""
    freq = torch.tensor([base ** (-2 * (a % (D // 2)) / D) for a in range(D)], dtype=torch.float64)
    if float32_frequencies:
        freq = freq.float().double()
    ang = torch.stack([p * freq for p in positions])
    return torch.cos(ang), torch.sin(ang)


def expected(q_raw, k, v, cos, sin, sinks=4, covariance=True, use_vnorm=True, epsilon=0.0):
    """6. q_raw (B,H,S,D) queries of the prompt BEFORE rotary; k (B,G,S,D) after rotary; v; cos, sin (n,D): the next n
    positions S .. S+n-1 (512).
      mu, C = mean and covariance (divided by the number) of q_raw without the first `sinks`; R = mean over positions of
      the rotation matrix diag(cos) + diag(sin) P, P = rotate-half; s_j = softmax over j >= sinks of
      k_j.(R mu)/sqrt(D) + k_j^T (R C R^T) k_j / (2D); mean over the group; (s + epsilon) |v_j|; first `sinks`: max + 1.
    """
    B, H, S, D = q_raw.shape
    G, n = k.shape[1], cos.shape[0]
    half = D // 2
    R = [[0.0] * D for _ in range(D)]
    for t in range(n):
        for a in range(D):
            R[a][a] = R[a][a] + cos[t, a] / n
            c, sign = (a + half, -1) if a < half else (a - half, 1)
            R[a][c] = R[a][c] + sign * sin[t, a] / n
    rows = []
    for b in range(B):
        heads = []
        for h in range(H):
            qs = [q_raw[b, h, t] for t in range(sinks, S)]
            mu = sum(qs) / len(qs)
            turned = [sum(R[a][c] * mu[c] for c in range(D)) for a in range(D)]
            if covariance:
                cov = [[sum((x[a] - mu[a]) * (x[c] - mu[c]) for x in qs) / len(qs) for c in range(D)] for a in range(D)]
                rc = [[sum(R[a][m] * cov[m][c] for m in range(D)) for c in range(D)] for a in range(D)]
                rcr = [[sum(rc[a][m] * R[c][m] for m in range(D)) for c in range(D)] for a in range(D)]
            s = []
            for j in range(sinks, S):
                key = k[b, h // (H // G), j]
                z = dot(key, turned) / math.sqrt(D)
                if covariance:
                    z = z + sum(key[a] * rcr[a][c] * key[c] for a in range(D) for c in range(D)) / (2 * D)
                s.append(z)
            heads.append(softmax(s))
        per = []
        for g in range(G):
            m = [sum(heads[h][j] for h in range(g * (H // G), (g + 1) * (H // G))) / (H // G) for j in range(S - sinks)]
            if use_vnorm:
                m = [(x + epsilon) * norm(v[b, g, sinks + j]) for j, x in enumerate(m)]
            per.append(m)
        rows.append(per)
    top = above_all(rows)
    return table([[[top] * sinks + r for r in b] for b in rows], B, G, S)


def count(S, ratio):
    """n = int(S (1 - ratio)) kept per key head."""
    return int(S * (1 - ratio))


def keep(scores, n):
    """scores (B,G,S) -> indices (B,G,n) sorted ascending. Ties (StreamingLLM's ones) to the earlier key here."""
    B, G, S = scores.shape
    return torch.tensor(
        [[sorted(sorted(range(S), key=lambda j: (-num(scores[b, g, j]), j))[:n]) for g in range(G)] for b in range(B)]
    ).reshape(B, G, n)


def pyramid_budgets(S, ratio, layers, window=64, beta=20):
    """7. number kept per layer: b = S (1 - ratio); min = b / beta, max = 2 b - min, linear from max (layer 0) to min;
    max at most S - window (then min = 2 b - max); falls back to round(b) unless S >= max >= min >= window.
    (kvpress's form.) -> list of ints."""
    b = S * (1 - ratio)
    low = b / beta
    high = 2 * b - low
    if high >= S - window:
        high = S - window
        low = 2 * b - high
    if not (S >= high >= low >= window):
        return [round(b)] * layers
    return [round(high - l * (high - low) / (layers - 1)) for l in range(layers)]


def adakv(scores, ratio, alpha=0.2):
    """7. scores (B,G,S) -> keep mask (B,G,S): the layer's budget shared by heads. Each head keeps its best
    int(n alpha) for sure, the rest of G n places go to the best (head, key) pairs of the layer, n = int(S (1 - ratio)).
    # OPEN: ties to the earlier head and key."""
    B, G, S = scores.shape
    n = count(S, ratio)
    out = torch.zeros(B, G, S, dtype=torch.bool)
    for b in range(B):
        for g in range(G):
            for j in sorted(range(S), key=lambda j: (-num(scores[b, g, j]), j))[: int(n * alpha)]:
                out[b, g, j] = True
        left = [(g, j) for g in range(G) for j in range(S) if not bool(out[b, g, j])]
        left.sort(key=lambda gj: (-num(scores[b, gj[0], gj[1]]), gj))
        for g, j in left[: G * n - int(out[b].sum())]:
            out[b, g, j] = True
    return out


def attend(q, k, v, seen):
    """one query q (D,) over the positions `seen` of k, v (S,D) -> output, list of weights."""
    p = softmax([dot(q, k[j]) / math.sqrt(len(q)) for j in seen])
    return sum(w * v[j] for w, j in zip(p, seen)), p


def evicting_prefill(q, k, v, prompt, kept):
    """8. Eviction once after the prompt. q (B,H,T,D), k, v (B,G,T,D) all tokens (rotary by TEXT position already in
    them); prompt length S; kept (B,G,n) indices from keep(). Prompt rows: full causal attention; later rows attend the
    kept prompt keys and every later key up to themselves. -> y (B,H,T,D)."""
    B, H, T, _ = q.shape
    G = k.shape[1]
    out = []
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for i in range(T):
                if i < prompt:
                    seen = list(range(i + 1))
                else:
                    seen = [int(j) for j in kept[b, g]] + list(range(prompt, i + 1))
                out.append(attend(q[b, h, i], k[b, g], v[b, g], seen)[0])
    return torch.stack(out).reshape(B, H, T, -1)


def evicting_stream(q, k, v, budget, policy, sinks=4):
    """when="step" (recalled forms): token by token from nothing; each query attends what is alive and itself; then,
    while more than `budget` keys are alive in a key head, the worst one goes.
      "streaming": the oldest key that is not one of the first `sinks` positions
      "tova": the lowest weight of this query, mean over ALL heads, same keys for every key head; the newest never
      "h2o":  the lowest running SUM of weights (mean over the group), budget // 2 newest never
      "knorm": the largest |k|
    -> y (B,H,T,D), alive[b][g] lists of original positions at the end.
    # OPEN: the library code evicts after prefill only; order within a step (attend, then evict) and "knorm" per step
    #   are choices here. Weights are over alive keys only, so sums depend on earlier evictions, as in H2O.
    """
    B, H, T, _ = q.shape
    G = k.shape[1]
    R = H // G
    y = [[[None] * T for _ in range(H)] for _ in range(B)]
    end = []
    for b in range(B):
        alive = [[] for _ in range(G)]
        total = [{} for _ in range(G)]
        for i in range(T):
            last = [{} for _ in range(G)]
            for g in range(G):
                alive[g].append(i)
                for h in range(g * R, (g + 1) * R):
                    y[b][h][i], p = attend(q[b, h, i], k[b, g], v[b, g], alive[g])
                    for w, j in zip(p, alive[g]):
                        last[g][j] = last[g].get(j, 0) + num(w) / R
                        total[g][j] = total[g].get(j, 0) + num(w) / R
            for g in range(G):
                while len(alive[g]) > budget:
                    if policy == "streaming":
                        worst = next(j for j in alive[g] if j >= sinks)
                    elif policy == "tova":
                        mean = {j: sum(last[m][j] for m in range(G)) / G for j in last[0]}
                        worst = min([j for j in alive[g] if j != i], key=lambda j: (mean[j], j))
                    elif policy == "h2o":
                        free = alive[g][: len(alive[g]) - budget // 2]
                        worst = min(free, key=lambda j: (total[g][j], j))
                    elif policy == "knorm":
                        worst = max(alive[g], key=lambda j: (num(norm(k[b, g, j])), -j))
                    else:
                        raise ValueError(policy)
                    alive[g].remove(worst)
        end.append(alive)
    return torch.stack([torch.stack([torch.stack(r) for r in b]) for b in y]), end
