"""Routing attention written out (Roy et al. 2020): clusters of tokens by centroid, attention inside each cluster.

form "official": layer-normed q and k are routed and attended to, no 1/sqrt(D), count of clusters plus 1e-2.
form "unit": routing by unit vectors, attention by the raw ones with 1/sqrt(D), count plus 1e-5, learned memory slots.
"""

import torch


def _layer_norm(x):
    mean = sum(x) / len(x)
    variance = sum((e - mean) ** 2 for e in x) / len(x)
    return (x - mean) / torch.sqrt(variance + 1e-6)


def _unit(x):
    return x / torch.sqrt(torch.dot(x, x)).clamp(min=1e-12)


def _normed(x, form):
    """(B,H,T,D) -> the same, every token's vector normalised by itself."""
    one = _layer_norm if form == "official" else _unit
    rows = [one(x[b, h, t]) for b in range(x.shape[0]) for h in range(x.shape[1]) for t in range(x.shape[2])]
    return torch.stack(rows).reshape(x.shape)


def _top(vectors, centroid, window, keep):
    """The positions, in order of time, of the `window` kept vectors nearest to the centroid by dot product."""
    ranked = [(float(torch.dot(vectors[t], centroid)), t) for t in range(len(vectors)) if keep is None or keep[t]]
    ranked.sort(key=lambda pair: -pair[0])
    return sorted(t for _, t in ranked[:window])


def naive_routes(
    q, k, means, window, *, context_window=None, shared=False, form="official", mask=None, context_mask=None
):
    """q (B,H,T,D), k (B,H,S,D), means (H,C,D) -> lists queries[b][h][c], keys[b][h][c] of positions.

    Every centroid takes the `window` queries and the `context_window` (default: window) keys that lie nearest to it,
    real ones only (mask (B,T), context_mask (B,S), True = real; keys of one sequence default to the queries' mask).
    shared: keys are the queries, so both lists are the queries' list.
    """
    q = _normed(q.detach(), form)
    k = q if shared else _normed(k.detach(), form)
    context_mask = mask if context_mask is None and k.shape[2] == q.shape[2] else context_mask
    context_window = window if context_window is None else context_window
    queries, keys = [], []
    for b in range(q.shape[0]):
        queries.append([])
        keys.append([])
        for h in range(q.shape[1]):
            here, there = [], []
            for centroid in means[h]:
                here.append(_top(q[b, h], centroid, window, None if mask is None else mask[b]))
                there.append(_top(k[b, h], centroid, context_window, None if context_mask is None else context_mask[b]))
            queries[b].append(here)
            keys[b].append(here if shared else there)
    return queries, keys


def naive_routing_transformer(
    q, k, v, means, window, *, causal=False, shared=False, form="official", context_window=None, mask=None,
    context_mask=None, memory_key=None, memory_value=None, routes=None, pads_are_routed=False,
):  # fmt: skip
    """q (B,H,T,D), k, v (B,H,S,D), means (H,C,D) -> (B,H,T,D).

    1. routes: see naive_routes; no gradient. `routes` given = used instead (causality tests fix them).
    2. In cluster c, query i attends to the cluster's keys j (causal: j <= i by position), and to the memory slots
       memory_key, memory_value (H,C,R,D), which are never masked.
       "official": logits LN(q_i) . LN(k_j); shared: k := q. "unit": logits q_i . k_j / sqrt(D) with raw vectors;
       shared: k_j := q_j / |q_j| and the pair j = i counts only if there is no other (its logit is -5e4).
    3. out_i = (sum of its clusters' outputs) / (their number + eps), eps = 1e-2 "official", 1e-5 "unit"; none: 0.
       A query that sees no key in a cluster adds 0 there but the cluster is counted.
    pads_are_routed: padding competes for places in the clusters and is masked afterwards, and a query that sees nothing
    takes the plain mean of the cluster's values (what the unit form's code does); False: padding is never routed.
    """
    batch, heads, length, width = q.shape
    options = {"context_window": context_window, "shared": shared, "form": form}
    if not pads_are_routed:
        options |= {"mask": mask, "context_mask": context_mask}
    lists = routes or naive_routes(q, k, means, window, **options)
    if context_mask is None and v.shape[2] == length:
        context_mask = mask
    normed_q = _normed(q, form)
    if form == "official":
        query, key, scale, eps = normed_q, normed_q if shared else _normed(k, form), 1.0, 1e-2
    else:
        query, key, scale, eps = q, normed_q if shared else k, width**-0.5, 1e-5
    rows = []
    for b in range(batch):
        for h in range(heads):
            sums = [v.new_zeros(v.shape[-1]) for _ in range(length)]
            counts = [0] * length
            for c in range(means.shape[1]):
                for i in lists[0][b][h][c]:
                    logits, values = [], []
                    if (
                        pads_are_routed
                        and mask is not None
                        and not any(
                            mask[b, i] and context_mask[b, j] and not (causal and j > i) for j in lists[1][b][h][c]
                        )
                    ):
                        counts[i] += 1
                        sums[i] = sums[i] + sum(v[b, h, j] for j in lists[1][b][h][c]) / len(lists[1][b][h][c])
                        continue
                    for j in lists[1][b][h][c]:
                        if (causal and j > i) or (context_mask is not None and not context_mask[b, j]):
                            continue
                        itself = shared and form == "unit" and j == i
                        logits.append(q.new_tensor(-5e4) if itself else scale * torch.dot(query[b, h, i], key[b, h, j]))
                        values.append(v[b, h, j])
                    if memory_key is not None:
                        for r in range(memory_key.shape[2]):
                            logits.append(scale * torch.dot(query[b, h, i], memory_key[h, c, r]))
                            values.append(memory_value[h, c, r])
                    counts[i] += 1
                    if not logits:
                        continue
                    top = max(x.item() for x in logits)
                    weights = [torch.exp(x - top) for x in logits]
                    total = sum(weights)
                    sums[i] = sums[i] + sum(w / total * x for w, x in zip(weights, values, strict=True))
            rows += [s / (n + eps) if n else s for s, n in zip(sums, counts, strict=True)]
    return torch.stack(rows).reshape(batch, heads, length, v.shape[-1])


def naive_routing_loss(q, k, means, *, form="official", beta=1.0):
    """q (B,H,T,D), k (B,H,S,D), means (H,C,D) -> beta * mean of (x - mu_b(x))^2 over tokens and features.

    x is the normed vector, b(x) the centroid with the largest dot product; the centroids are constants.
    For shared keys pass an empty k (S = 0): only the queries are counted.
    """
    normed = torch.cat([_normed(q, form), _normed(k, form)] if k.shape[2] else [_normed(q, form)], dim=2)
    total, count = q.new_zeros(()), 0
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for x in normed[b, h]:
                scores = [float(torch.dot(x.detach(), mu)) for mu in means[h]]
                nearest = means[h][scores.index(max(scores))].detach()
                for e in range(len(x)):
                    total = total + (x[e] - nearest[e]) ** 2
                    count += 1
    return beta * total / count


def naive_centroids(q, k, means, *, form="unit", decay=0.999):
    """q (B,H,T,D), k (B,H,S,D), means (H,C,D) -> the new means (form "unit": mean direction, equation of step 7).

    m_c = unit(sum of all normed q and k of the batch that are nearest to c); mu_c <- decay mu_c + (1 - decay) m_c;
    an empty cluster keeps its mean. For shared keys pass an empty k.
    """
    parts = [_normed(q, form), _normed(k, form)] if k.shape[2] else [_normed(q, form)]
    new = means.clone()
    for h in range(means.shape[0]):
        for c in range(means.shape[1]):
            total, found = torch.zeros_like(means[h, c]), 0
            for part in parts:
                for b in range(part.shape[0]):
                    for x in part[b, h]:
                        scores = [float(torch.dot(x, mu)) for mu in means[h]]
                        if scores.index(max(scores)) == c:
                            total, found = total + x, found + 1
            if found:
                new[h, c] = decay * means[h, c] + (1 - decay) * _unit(total)
    return new


def naive_official_centroids(q, k, counts, sums, means, *, decay=0.99):
    """Form "official", step 4': q, k (B,H,T,D), counts (H,C), sums (H,C,D), means (H,C,D) -> (counts, sums, means).

    First by the queries, then by the keys (assigned to the means that the queries have moved; an empty k is skipped):
    N_c <- d N_c + (1-d) n_c; S_c <- d S_c + (1-d) sum of x; mu_c = S_c / N~_c
    with N~_c = (N_c + 1e-5) / (sum N + C 1e-5) sum N.
    """
    clusters = means.shape[1]
    for part in (_normed(q, "official"), _normed(k, "official") if k.shape[2] else None):
        if part is None:
            continue
        counts, sums, fresh = counts.clone(), sums.clone(), means.clone()
        for h in range(means.shape[0]):
            found = [0.0] * clusters
            total = [torch.zeros_like(means[h, 0]) for _ in range(clusters)]
            for b in range(part.shape[0]):
                for x in part[b, h]:
                    scores = [float(torch.dot(x, mu)) for mu in means[h]]
                    c = scores.index(max(scores))
                    found[c] += 1
                    total[c] = total[c] + x
            for c in range(clusters):
                counts[h, c] = decay * counts[h, c] + (1 - decay) * found[c]
                sums[h, c] = decay * sums[h, c] + (1 - decay) * total[c]
            everything = counts[h].sum()
            for c in range(clusters):
                smooth = (counts[h, c] + 1e-5) / (everything + clusters * 1e-5) * everything
                fresh[h, c] = sums[h, c] / smooth
        means = fresh
    return counts, sums, means
