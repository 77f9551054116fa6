"""HiP written out (arXiv 2406.09827): tree search for the key blocks of a query block. Causal.

Its author has read neither the code nor its tests.
There are no golden numbers at hand; with every key chosen it equals dense attention to 4.5e-16.
"""

import math

import torch


def softmax(scores):
    top = max(float(s.detach()) for s in scores)
    e = [torch.exp(s - top) for s in scores]
    total = sum(e)
    return [x / total for x in e]


def representative(start, end, kind):
    """The key block that stands for the child [start, end)."""
    return {"first": start, "last": end - 1, "center": start + (end - start) // 2}[kind]


def tree_topk(scores_of, num_blocks, keep, kind="center"):
    """Eq. 2-4. scores_of(block) -> number; keep = m branches -> sorted list of m blocks, and how many were scored."""
    branches = [(int(num_blocks / keep * i), int(num_blocks / keep * (i + 1))) for i in range(keep)]
    width, scored = num_blocks / keep, 0  # the nominal width ends the loop
    while width > 1:
        children = []
        for s, e in branches:
            middle = s + int((e - s) / 2)
            children += [(s, middle), (middle, e)]
        scores = []
        for s, e in children:
            scores.append(scores_of(representative(s, e, kind)) if e > s else -32000.0)
            scored += e > s
        best = sorted(range(len(children)), key=lambda i, scores=scores: -scores[i])[:keep]
        branches = [children[i] for i in sorted(best)]
        width /= 2
    return sorted(s for s, _ in branches), scored


def hip(q, k, *, mask_k=512, block_q=64, block_k=2, window=256, kind="center", query_stride=2):
    """Eq. 1-4. q (B,H,T,D), k (B,G,S,D) -> chosen (B,H,query blocks,key blocks) bool, scored (B,H,query blocks)."""
    q, k = q.detach(), k.detach()
    batch, heads, length, _ = q.shape
    group, keys = heads // k.shape[1], k.shape[2]
    n_q, n_k = math.ceil(length / block_q), math.ceil(keys / block_k)
    chosen, scored = torch.zeros(batch, heads, n_q, n_k, dtype=torch.bool), torch.zeros(batch, heads, n_q)
    for b in range(batch):
        for h in range(heads):
            for i in range(n_q):
                end = (i + 1) * block_q + keys - length
                reach = max(0, min(end, keys) - window)  # eq. 1: searchable are the first `reach` keys
                blocks = math.ceil(reach / block_k)
                if reach <= mask_k:
                    chosen[b, h, i, :blocks] = True
                    continue
                rows = q[b, h, i * block_q : (i + 1) * block_q]
                sample = rows[query_stride - 1 :: query_stride]
                sample = sample if len(sample) else rows[-1:]

                def score(j, sample=sample, keys_of=k[b, h // group], reach=reach):
                    places = range(j * block_k, min((j + 1) * block_k, reach))
                    return max(float((row * keys_of[s]).sum()) for row in sample for s in places)

                found, scored[b, h, i] = tree_topk(score, blocks, mask_k // block_k, kind)
                for j in found:
                    chosen[b, h, i, j] = True
    return chosen, scored


def visible(chosen, b, h, t, length, keys, *, block_q, block_k, window, sinks):
    """Eq. 5. The keys query t sees: chosen ones up to its own position, its window, the first `sinks` keys."""
    place = t + keys - length
    return [s for s in range(place + 1)
            if chosen[b, h, t // block_q, s // block_k] or s > place - window or s < sinks]  # fmt: skip


def attend(q, k, v, chosen, *, block_q=64, block_k=2, window=256, sinks=16, keep=None):
    """Eq. 5. v (B,G,S,V), keep (B,S) -> out (B,H,T,V)."""
    batch, heads, length, d = q.shape
    group, keys = heads // k.shape[1], k.shape[2]
    outs = []
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                seen = visible(chosen, b, h, t, length, keys, block_q=block_q, block_k=block_k, window=window,
                               sinks=sinks)  # fmt: skip
                seen = [s for s in seen if keep is None or bool(keep[b, s])]
                w = softmax([(q[b, h, t] * k[b, h // group, s]).sum() / math.sqrt(d) for s in seen])
                outs.append(sum(a * v[b, h // group, s] for a, s in zip(w, seen, strict=True)))
    return torch.stack(outs).reshape(batch, heads, length, -1)


# Doubts: "center" of a child is read as s + (e - s) // 2; a key block that ends past the searchable part is scored by
# its searchable keys only; the sampled queries are the last of every `query_stride` (odd ones for 2). A key in the
# window or a sink may be chosen too and counts once. Not written: random, position and oracle representatives, the
# bidirectional form (no equations for it were at hand).
