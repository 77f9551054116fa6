"""CATANet token aggregation, the block with its FFN. Equations 1-9 (no host network).

Its author has read neither the code nor its tests. The sort is stable.
Largest difference to the golden numbers: values 6.3e-15, gradients 6.4e-14, means 2.3e-16, labels equal.
"""

import math

import torch
from torch.nn.functional import gelu


def linear(x, w, b=None):
    return torch.stack([(row * x).sum() for row in w]) + (0 if b is None else b)


def softmax(scores):
    top = max(float(s.detach()) for s in scores)
    e = [torch.exp(s - top) for s in scores]
    total = sum(e)
    return [x / total for x in e]


def layer_norm(x, w, b, eps=1e-5):
    d = x - x.mean()
    return d / torch.sqrt((d**2).mean() + eps) * w + b


def nrm(z):
    return z / torch.clamp(torch.sqrt((z**2).sum()), min=1e-12)


def nearest(x, centers):
    """argmax_j nrm(x).nrm(c_j), the first among equals, no gradient."""
    return max(range(len(centers)), key=lambda j: float((nrm(x) * nrm(centers[j])).sum().detach()))


def first_centers(u, m):
    """Eq. 2. u: list (B) of lists (N) of vectors -> m means of contiguous runs (no gradient)."""
    n = len(u[0])
    p = m - n % m
    longer, run = [row + row[::-1][:p] for row in u], (n + p) // m
    return [torch.stack([z for row in longer for z in row[j * run : (j + 1) * run]]).mean(0).detach() for j in range(m)]


def step(u, centers):
    """Eq. 3. One assignment and renewal over the whole batch."""
    sums = [None] * len(centers)
    for row in u:
        for x in row:
            j = nearest(x, centers)
            sums[j] = nrm(x) if sums[j] is None else sums[j] + nrm(x)
    return [nrm(c if s is None else s) for c, s in zip(centers, sums, strict=True)]


def sorted_groups(label, size):
    """Eq. 5-6. labels of one image -> list of (query tokens, key tokens), a group each; reflected keys count twice."""
    n, g = len(label), min(len(label), size)
    order, count = sorted(range(n), key=lambda i: label[i]), math.ceil(n / g)
    longer = order + order[::-1][: count * g - n + g]
    return [(order[r * g : (r + 1) * g], longer[r * g : (r + 2) * g]) for r in range(count)]


def attend(q, keys, values, d):
    w = softmax([(q * k).sum() / math.sqrt(d) for k in keys])
    return sum(a * v for a, v in zip(w, values, strict=True))


def aggregate(x, p, means, initted, *, heads, group_size, iters, decay=0.999, training=False):
    """Eq. 1-7, 9. x (B,C,Y,X), means (m,C) -> branch (B,C,Y,X) (no residual), new means (m,C), labels (B,N).

    p: norm_w, norm_b, wq, wk (qk,C), wv (C,C), wkc (qk,C), wvc, wo, conv (C,C).
    """
    batch, channels, height, width = x.shape
    n = height * width
    u = [[layer_norm(x[b, :, i // width, i % width], p["norm_w"], p["norm_b"]) for i in range(n)] for b in range(batch)]
    centers = list(means) if initted else first_centers(u, len(means))
    if training:
        fixed = [[nrm(z).detach() for z in row] for row in u]
        for _ in range(iters - 1):
            centers = step(fixed, centers)
        centers = step(u, centers)
    d, e = p["wq"].shape[0] // heads, channels // heads
    kg, vg = [linear(c, p["wkc"]) for c in centers], [linear(c, p["wvc"]) for c in centers]  # eq. 4
    labels = [[nearest(z, centers) for z in row] for row in u]  # eq. 5
    images = []
    for b in range(batch):
        q, k, v = ([linear(z, p[name]) for z in u[b]] for name in ("wq", "wk", "wv"))
        outs = {}
        for queries, keys in sorted_groups(labels[b], group_size):
            for i in queries:
                parts = []
                for a, c in ((slice(h * d, (h + 1) * d), slice(h * e, (h + 1) * e)) for h in range(heads)):
                    o1 = attend(q[i][a], [k[j][a] for j in keys], [v[j][c] for j in keys], d)  # eq. 6
                    o2 = attend(q[i][a], [key[a] for key in kg], [val[c] for val in vg], d)  # eq. 7
                    parts.append(o1 + o2)
                outs[i] = linear(linear(torch.cat(parts), p["wo"]), p["conv"])
        images.append(torch.stack([outs[i] for i in range(n)], 1).reshape(channels, height, width))
    if training:  # eq. 9
        c = torch.stack(centers).detach()
        means = decay * means + (1 - decay) * c if initted else c
    return torch.stack(images), means, torch.tensor(labels)


def feed_forward(x, p):
    """Eq. 8. p: ffn_norm_w, ffn_norm_b, fc1_w, fc1_b, dw_w (F,5,5), dw_b, fc2_w, fc2_b. -> branch (B,C,Y,X)."""
    batch, _, height, width = x.shape
    images = []
    for b in range(batch):
        cells = [(y, c) for y in range(height) for c in range(width)]
        u = {(y, c): layer_norm(x[b, :, y, c], p["ffn_norm_w"], p["ffn_norm_b"]) for y, c in cells}
        h, outs = {at: gelu(linear(u[at], p["fc1_w"], p["fc1_b"])) for at in cells}, []
        for y, c in cells:
            near = [(i, j) for i in range(5) for j in range(5) if (y + i - 2, c + j - 2) in h]
            conv = sum(p["dw_w"][:, i, j] * h[y + i - 2, c + j - 2] for i, j in near) + p["dw_b"]
            outs.append(linear(h[y, c] + gelu(conv), p["fc2_w"], p["fc2_b"]))
        images.append(torch.stack(outs, 1).reshape(x.shape[1:]))
    return torch.stack(images)
