"""AnchorAttention written out: stripes of single keys chosen against an anchor score.

Its author has read neither the code nor its tests.
Largest difference to the golden numbers (single precision, no gradients; code_ranges=True): anchors 1.2e-6, output
5.9e-7, taken keys equal. With theta -> infinity the library form equals dense causal attention to 4.5e-16.
"""

import math

import torch


def softmax(scores):
    top = max(float(s.detach()) for s in scores)
    e = [torch.exp(s - top) for s in scores]
    total = sum(e)
    return [x / total for x in e]


def ranges(run, size, *, block, init, local, code_ranges):
    """-> end of the initial part, start of the local part, range of candidate keys, all for one run of queries.

    Library: initial part = first `init` blocks; candidates = everything between it and the local part, each key once.
    code_ranges: the initial part of the released kernels is `init` whole runs and their candidates end one block early.
    """
    start = max(0, (run + 1 - local) * size)
    if code_ranges:
        return init * size, start, range(block, max(block, start - block))
    return init * block, start, range(init * block, max(init * block, start))


def anchor_stripes(q, k, *, theta=12.0, block=128, step=16, init=1, local=1, code_ranges=False):
    """q (B,H,T,D), k (B,G,T,D) -> anchor (B,H,T), taken (B,H,runs) list of lists of key positions. No gradient."""
    q, k = q.detach(), k.detach()
    batch, heads, length, d = q.shape
    group, size = heads // k.shape[1], block * step
    scale = 1 / math.sqrt(d)
    anchors, taken = torch.zeros(batch, heads, length, dtype=q.dtype), []
    for b in range(batch):
        taken.append([])
        for h in range(heads):
            taken[b].append([])
            keys = k[b, h // group]
            for run in range(math.ceil(length / size)):
                first, start, candidates = ranges(run, size, block=block, init=init, local=local,
                                                  code_ranges=code_ranges)  # fmt: skip
                places = range(run * size, min(length, (run + 1) * size))
                for t in places:  # eq. 1: the largest score of the anchor region
                    region = [s for s in range(t + 1) if s < first or s >= start]
                    anchors[b, h, t] = max(float((q[b, h, t] * keys[s]).sum()) * scale for s in region)
                picked = set()
                for low in range(places[0], places[-1] + 1, block):  # eq. 2: any sub-block may take a key
                    sub = [t for t in places if low <= t < low + block]
                    q_mean = sum(q[b, h, t] for t in sub) / len(sub)
                    a_mean = float(sum(anchors[b, h, t] for t in sub)) / len(sub)
                    picked |= {s for s in candidates if float((q_mean * keys[s]).sum()) * scale + theta >= a_mean}
                taken[b][h].append(sorted(picked))
    return anchors, taken


def attend(q, k, v, taken, *, block=128, step=16, init=1, local=1, code_ranges=False):
    """Eq. 3. Softmax over the anchor region and the taken keys. -> (B,H,T,V).

    With code_ranges a key that is in the region and taken is listed twice and counts twice, as in the kernels.
    """
    batch, heads, length, d = q.shape
    group, size = heads // k.shape[1], block * step
    outs = []
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // group].unbind(0), v[b, h // group].unbind(0)
            for t in range(length):
                run = t // size
                first, start, _ = ranges(run, size, block=block, init=init, local=local, code_ranges=code_ranges)
                seen = [s for s in range(t + 1) if s < first or s >= start] + taken[b][h][run]
                p = softmax([(q[b, h, t] * keys[s]).sum() / math.sqrt(d) for s in seen])
                outs.append(sum(w * values[s] for w, s in zip(p, seen, strict=True)))
    return torch.stack(outs).reshape(batch, heads, length, -1)


def anchor_attention(q, k, v, **options):
    """q (B,H,T,D), k (B,G,T,D), v (B,G,T,V) -> out (B,H,T,V), anchor, taken. Options of anchor_stripes. Causal only."""
    anchors, taken = anchor_stripes(q, k, **options)
    options.pop("theta", None)
    return attend(q, k, v, taken, **options), anchors, taken
