"""XAttention written out (arXiv 2503.16428): antidiagonal scores, block masses, the fewest blocks that suffice."""

import math

import torch


def naive_xattention_sums(q, k, block, stride, *, causal=True, chunk=None):
    """q (B,H,T,D), k (B,G,S,D) -> R (B,H,I,J), the block masses of steps 0-4.

    q and k are padded at the end with zeros to a multiple of `chunk` (default: of `block`). Groups of `stride` tokens;
    L_mn = sum_u <q[m s + s-1-u], k[n s + u]> / (sqrt(D) s); causal: n > m + (S' - T')/s is out; softmax over n;
    the last floor(padding of q / s) rows count 0; R_IJ = sum over the groups m of query block I, n of key block J.
    """
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    per_head = heads // k.shape[1]
    chunk = block if chunk is None else chunk
    padded_q, padded_k = -(-queries // chunk) * chunk, -(-keys // chunk) * chunk
    ahead = (padded_k - padded_q) // stride
    empty = (padded_q - queries) // stride
    groups = block // stride
    sums = torch.zeros(batch, heads, padded_q // block, padded_k // block, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            source = k[b, h // per_head]
            for m in range(padded_q // stride - empty):
                logits = []
                for n in range(padded_k // stride):
                    if causal and n > m + ahead:
                        break
                    total = 0.0
                    for u in range(stride):
                        i, j = m * stride + stride - 1 - u, n * stride + u
                        if i < queries and j < keys:
                            total += float(torch.dot(q[b, h, i], source[j]))
                    logits.append(total / (math.sqrt(width) * stride))
                top = max(logits)
                weights = [math.exp(x - top) for x in logits]
                for n, w in enumerate(weights):
                    sums[b, h, m // groups, n // groups] += w / sum(weights)
    return sums


def naive_xattention_blocks(sums, threshold, *, causal=True, ahead=0):
    """R (B,H,I,J) -> bool (B,H,I,J), step 5: forced blocks {0, I + ahead} when causal, then others by decreasing mass

    for as long as the mass chosen so far is below threshold * the row's mass. ahead = (S' - T') / block.
    """
    kept = torch.zeros(sums.shape, dtype=torch.bool)
    for b in range(sums.shape[0]):
        for h in range(sums.shape[1]):
            for i in range(sums.shape[2]):
                row = [float(x) for x in sums[b, h, i]]
                current = i + ahead
                forced = {0, current} if causal else set()
                mass = 0.0
                for j in forced:
                    kept[b, h, i, j] = True
                    mass += row[j]
                last = current if causal else len(row) - 1
                others = sorted((j for j in range(last + 1) if j not in forced), key=lambda j: -row[j])
                for j in others:
                    if mass >= threshold * sum(row):
                        break
                    kept[b, h, i, j] = True
                    mass += row[j]
    return kept


def naive_xattention(q, k, v, block, stride, threshold, *, causal=True, chunk=None):
    """q (B,H,T,D), k (B,G,S,D), v (B,G,S,V) -> (B,H,T,V), step 6: softmax over the tokens of the kept blocks,

    scale D^-1/2; causal counts from the end (query t stands at key position t + S - T). Give T and S whose difference
    is a multiple of `block`, or T = S: then the blocks' diagonal and the tokens' diagonal agree.
    """
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    per_head = heads // k.shape[1]
    sums = naive_xattention_sums(q.detach(), k.detach(), block, stride, causal=causal, chunk=chunk)
    kept = naive_xattention_blocks(sums, threshold, causal=causal, ahead=sums.shape[3] - sums.shape[2])
    rows = []
    for b in range(batch):
        for h in range(heads):
            g = h // per_head
            for t in range(queries):
                seen = [
                    j
                    for j in range(keys)
                    if kept[b, h, t // block, j // block] and (not causal or j <= t + keys - queries)
                ]
                if not seen:
                    rows.append(v.new_zeros(v.shape[-1]))
                    continue
                logits = [torch.dot(q[b, h, t], k[b, g, j]) / math.sqrt(width) for j in seen]
                top = max(x.item() for x in logits)
                weights = [torch.exp(x - top) for x in logits]
                total = sum(weights)
                rows.append(sum(w / total * v[b, g, j] for w, j in zip(weights, seen, strict=True)))
    return torch.stack(rows).reshape(batch, heads, queries, v.shape[-1])
