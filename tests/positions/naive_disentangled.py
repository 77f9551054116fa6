"""Disentangled attention in loops: written from the equations by somebody who saw neither the code nor the tests."""

import math

import torch

from naive import linear, softmax


def log_bucket(r, buckets, max_distance):
    """Eq. 3, signed."""
    mid = buckets // 2
    if abs(r) <= mid:
        return r
    far = math.ceil(math.log(abs(r) / mid) / math.log((max_distance - 1) / mid) * (mid - 1)) + mid
    return far if r > 0 else -far


def index(r, k, buckets=None, max_distance=None):
    """t(r), r = i - j (query minus key); with buckets k is their number."""
    if buckets is not None:
        r = log_bucket(r, buckets, max_distance)
    return min(max(r + k, 0), 2 * k - 1)


def disentangled(
    x,
    rel,
    heads,
    wq,
    bq,
    wk,
    bk,
    wv,
    bv,
    pos_q=None,
    pos_k=None,
    keep=None,
    buckets=None,
    max_distance=None,
    terms=("c2p", "p2c"),
):
    """x (B,T,M), rel (2k,M) -> concatenated heads (B,T,M), weights (B,H,T,T).

    pos_q, pos_k: (weight, bias) of the position maps, None: the content maps (shared). Padded queries give zeros.
    """
    batch, length, _ = x.shape
    d, k_span = wq.shape[0] // heads, rel.shape[0] // 2
    qr = [linear(p, *((wq, bq) if pos_q is None else pos_q)) for p in rel]
    kr = [linear(p, *((wk, bk) if pos_k is None else pos_k)) for p in rel]
    outs, ws = [], []
    for b in range(batch):
        q, k, v = ([linear(t, w, c) for t in x[b]] for w, c in ((wq, bq), (wk, bk), (wv, bv)))
        for i in range(length):
            parts = []
            for h in range(heads):
                cut = slice(h * d, (h + 1) * d)
                seen = [j for j in range(length) if keep is None or (bool(keep[b, i]) and bool(keep[b, j]))]
                logits = []
                for j in seen:
                    t = index(i - j, k_span, buckets, max_distance)
                    s = (q[i][cut] * k[j][cut]).sum()
                    if "c2p" in terms:
                        s = s + (q[i][cut] * kr[t][cut]).sum()
                    if "p2c" in terms:
                        s = s + (k[j][cut] * qr[t][cut]).sum()
                    logits.append(s / math.sqrt((1 + len(terms)) * d))
                row, y = [torch.zeros((), dtype=x.dtype)] * length, torch.zeros(d, dtype=x.dtype)
                for a, j in zip(softmax(logits) if seen else [], seen, strict=True):
                    row[j] = a
                    y = y + a * v[j][cut]
                parts.append(y)
                ws.append(torch.stack(row))
            outs.append(torch.cat(parts))
    return (
        torch.stack(outs).reshape(batch, length, -1),
        torch.stack(ws).reshape(batch, length, heads, length).transpose(1, 2),
    )
