"""Window-query attention and what stands around it, one number at a time, by somebody who saw the equations only."""

import math

import torch

from naive import linear, softmax


def layer_norm(v, weight, bias, eps=1e-24):
    n = v.shape[0]
    mean = v.sum() / n
    centred = v - mean
    var = (centred * centred).sum() / n
    return centred / torch.sqrt(var + eps) * weight + bias


def embed(items, E, P):
    """eq. 1.  items (B,T) with pad id = E.shape[0]; -> x0 (B,T,M), m (B,T) bool."""
    pad, M = E.shape[0], E.shape[1]
    zero = E.new_zeros(M)
    x = torch.stack(
        [
            torch.stack([zero if int(i) == pad else math.sqrt(M) * E[int(i)] + P[t] for t, i in enumerate(row)])
            for row in items
        ]
    )
    return x, torch.stack([torch.stack([i != pad for i in row]) for row in items])


def window_mean(x, keep, t, window):
    """eq. 2 for one example x (T,M), keep (T,)."""
    total, count = torch.zeros_like(x[0]), 0.0
    for l in range(window):
        if t - l < 0 or not bool(keep[t - l]):
            continue
        total = total + x[t - l]
        count += 1.0
    return total / (count + 1e-24)


def window_query_attention(x, keep, *, norm_weight, norm_bias, Wq, Wk, Wv, bq, bk, bv, num_heads, window, causal=True):
    """eqs. 2-5 and the sum inside 6: concat_h(A v) + n  (B,T,M); the norm after it is not applied."""
    batch = []
    for b in range(x.shape[0]):
        D = x.shape[2] // num_heads
        k = [linear(x[b, j], Wk, bk) for j in range(x.shape[1])]
        v = [linear(x[b, j], Wv, bv) for j in range(x.shape[1])]
        rows = []
        for i in range(x.shape[1]):
            n = layer_norm(window_mean(x[b], keep[b], i, window), norm_weight, norm_bias)
            q = linear(n, Wq, bq)
            js = [j for j in range(x.shape[1]) if bool(keep[b][j]) and (j <= i or not causal)]
            heads = []
            for h in range(num_heads):
                cut = slice(h * D, (h + 1) * D)
                y = x.new_zeros(D)
                if js:
                    p = softmax([(q[cut] * k[j][cut]).sum() / math.sqrt(D) for j in js])
                    for w, j in zip(p, js):
                        y = y + w * v[j][cut]
                heads.append(y)
            rows.append(torch.cat(heads) + n)
        batch.append(torch.stack(rows))
    return torch.stack(batch)


def block(x, keep, p, *, num_heads, window):
    """eqs. 2-6.  p: dict norm1_weight norm1_bias Wq bq Wk bk Wv bv norm2_weight norm2_bias W1 b1 W2 b2, W (out, in)."""
    a = window_query_attention(
        x,
        keep,
        norm_weight=p["norm1_weight"],
        norm_bias=p["norm1_bias"],
        Wq=p["Wq"],
        Wk=p["Wk"],
        Wv=p["Wv"],
        bq=p["bq"],
        bk=p["bk"],
        bv=p["bv"],
        num_heads=num_heads,
        window=window,
    )
    batch = []
    for b in range(x.shape[0]):
        rows = []
        for t in range(x.shape[1]):
            h = layer_norm(a[b, t], p["norm2_weight"], p["norm2_bias"])
            hidden = linear(h, p["W1"], p["b1"])
            hidden = torch.where(hidden > 0, hidden, torch.zeros_like(hidden))
            h = h + linear(hidden, p["W2"], p["b2"])
            rows.append(h if bool(keep[b][t]) else torch.zeros_like(h))
        batch.append(torch.stack(rows))
    return torch.stack(batch)


def stack(x, keep, blocks, final_weight, final_bias, *, num_heads, window):
    for p in blocks:
        x = block(x, keep, p, num_heads=num_heads, window=window)
    return torch.stack(
        [
            torch.stack([layer_norm(x[b, t], final_weight, final_bias) for t in range(x.shape[1])])
            for b in range(x.shape[0])
        ]
    )


def logits(short, long, E, alpha=0.5):
    """eq. 7: (B,T,items+1), last class = the zero row."""
    table = torch.cat([E, E.new_zeros(1, E.shape[1])])
    out = []
    for b in range(short.shape[0]):
        rows = []
        for t in range(short.shape[1]):
            mixed = alpha * short[b, t] + (1 - alpha) * long[b, t]
            rows.append(linear(mixed, table))
        out.append(torch.stack(rows))
    return torch.stack(out)


def next_item_loss(scores, target, pad):
    losses = []
    for b in range(scores.shape[0]):
        for t in range(scores.shape[1]):
            if int(target[b, t]) != pad:
                losses.append(-torch.log(torch.stack(softmax(list(scores[b, t])))[int(target[b, t])]))
    return sum(losses[1:], losses[0]) / len(losses)


def transition_counts(sequences, num_items, span=1):
    """lists (or rows) of item ids, pads (id >= num_items) skipped; C[i][j]: how often j follows i within span steps."""
    C = [[0.0] * num_items for _ in range(num_items)]
    for seq in sequences:
        seq = [int(i) for i in seq if 0 <= int(i) < num_items]
        for t in range(len(seq)):
            for s in range(1, span + 1):
                if t + s < len(seq):
                    C[seq[t]][seq[t + s]] += 1.0
    return torch.tensor(C, dtype=torch.float64)


def transition_labels(C, tau=0.1):
    """eq. 9 teacher (items, items)."""
    rows = []
    for i in range(C.shape[0]):
        top = float(C[i].max())
        rows.append(torch.stack(softmax([c / top / tau if top > 0 else torch.zeros_like(c) for c in C[i]])))
    return torch.stack(rows)


def transition_distillation(E, items, labels, tau=0.1, pad=None):
    """L_kd.  items: (B,T) ids, `pad` (default E.shape[0]) skipped."""
    pad = E.shape[0] if pad is None else pad
    M = E.shape[1]
    losses = []
    for row in items:
        for i in row:
            i = int(i)
            if i == pad:
                continue
            p = softmax([math.sqrt(M) * (E[i] * E[j]).sum() / tau for j in range(E.shape[0])])
            total = E.new_zeros(())
            for j in range(E.shape[0]):
                total = total + labels[i, j] * torch.log(p[j] + 1e-24)
            losses.append(-total)
    return sum(losses[1:], losses[0]) / len(losses)


def l2_penalty(tensors, l2):
    total = 0.0
    for t in tensors:
        total = total + (t * t).sum()
    return l2 / 2 * total
