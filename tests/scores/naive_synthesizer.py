"""Attention logits without products of queries and keys, by loops. Every logits function gives (B,H,T,T).

Their author has read neither code nor test of the library. N = max length.
"""

import torch


def linear(z, w, b=None):
    y = torch.stack([(row * z).sum() for row in w])
    return y if b is None else y + b


def softmax(logits):
    z = torch.stack(logits)
    e = torch.exp(z - z.detach().max())
    return e / e.sum()


def per_token(x, head_row, heads):
    """head_row(token vector, head) -> row of T logits."""
    batch, length, _ = x.shape
    rows = [head_row(x[b, i], h)[:length] for b in range(batch) for h in range(heads) for i in range(length)]
    return torch.stack(rows).reshape(batch, heads, length, length)


def head_input(token, h, heads, per_head):
    """The head's slice of the token, or all of it."""
    width = len(token) // heads
    return token[h * width : (h + 1) * width] if per_head else token


def dense(x, w1, b1, w2, b2, per_head=True):
    """w1 (H,D,M or M/H), b1 (H,D), w2 (H,N,D), b2 (H,N)."""
    heads = len(w1)

    def row(token, h):
        return linear(torch.relu(linear(head_input(token, h, heads, per_head), w1[h], b1[h])), w2[h], b2[h])

    return per_token(x, row, heads)


def random(x, r):
    """r (H,N,N), trained or fixed; only the shape of x is used."""
    return per_sample(x, [[[r[h, i, j] for j in range(x.shape[1])] for i in range(x.shape[1])] for h in range(len(r))])


def per_sample(x, table):
    one = torch.stack([torch.stack([torch.stack(row) for row in head]) for head in table])
    return torch.stack([one for _ in range(len(x))])


def dense_factorized(x, wa, ba, wc, bc, per_head=True):
    """wa (H,a,.), wc (H,c,.), a*c = N: logit_ij = A_{j mod a} C_{j // a}. Biases may be None."""
    heads, a = wa.shape[0], wa.shape[1]

    def row(token, h):
        z = head_input(token, h, heads, per_head)
        first = linear(z, wa[h], None if ba is None else ba[h])
        second = linear(z, wc[h], None if bc is None else bc[h])
        return torch.stack([first[j % a] * second[j // a] for j in range(a * len(second))])

    return per_token(x, row, heads)


def random_factorized(x, r1, r2):
    """r1, r2 (H,N,r): R = R1 R2^T."""
    n = range(x.shape[1])
    return per_sample(x, [[[(r1[h, i] * r2[h, j]).sum() for j in n] for i in n] for h in range(len(r1))])


def vanilla(q, k, scale=1.0):
    """The query-key part of a mixture. q, k (B,T,H,D)."""
    batch, length, heads, _ = q.shape
    n = range(length)
    rows = [
        torch.stack([scale * (q[b, i, h] * k[b, j, h]).sum() for j in n])
        for b in range(batch) for h in range(heads) for i in n
    ]  # fmt: skip
    return torch.stack(rows).reshape(batch, heads, length, length)


def mix(parts, raw):
    """parts: list of logits, raw: as many learned numbers, one for all heads."""
    alpha = softmax(list(raw))
    return sum(a * s for a, s in zip(alpha, parts, strict=True))


def attend(logits, v, causal=False, keep=None):
    """v (B,T,H,V), keep (B,T) or (B,T,S) true = seen -> out (B,T,H,V), weights. Nothing seen: 0."""
    batch, length, heads, v_dim = v.shape
    outs, weights = [], []
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                row = None if keep is None else (keep[b] if keep.dim() == 2 else keep[b, i])
                seen = [j for j in range(length) if not (causal and j > i) and (row is None or bool(row[j]))]
                p = softmax([logits[b, h, i, j] for j in seen]) if seen else []
                w = dict(zip(seen, p, strict=True))
                weights.append(torch.stack([w.get(j, v.new_zeros(())) for j in range(length)]))
                outs.append(sum((a * v[b, j, h] for j, a in w.items()), v.new_zeros(v_dim)))
    out = torch.stack(outs).reshape(batch, heads, length, v_dim).transpose(1, 2)
    return out, torch.stack(weights).reshape(batch, heads, length, length)


def layer(x, logits, wv, wo, heads, bv=None, bo=None, **masks):
    """v = x Wv, heads concatenated, Wo. x (B,T,M) -> (B,T,M)."""
    batch, length, _ = x.shape
    v = torch.stack([linear(t, wv, bv) for s in x for t in s]).reshape(batch, length, heads, -1)
    o, _ = attend(logits, v, **masks)
    return torch.stack([linear(t.reshape(-1), wo, bo) for s in o for t in s]).reshape(batch, length, -1)
