"""Jenga written out (arXiv 2505.16864): the curve, blocks chosen along it, and exact attention over them.

Its author has read neither the code nor its tests. The curve is the
published generalised Hilbert curve.
Largest difference to the golden numbers: values 2.7e-15, gradients 1.9e-14; curves, neighbours, masks equal.
"""

import math

import numpy as np
import torch


def softmax(scores):
    top = max(float(s.detach()) for s in scores)
    e = [torch.exp(s - top) for s in scores]
    total = sum(e)
    return [x / total for x in e]


def size(vector):
    return abs(int(vector.sum()))


def half(vector):
    """Floor half (// of numpy rounds down for negative numbers too), one more step when odd and longer than 2."""
    cut = vector // 2
    return cut + np.sign(vector) if size(cut) % 2 and size(vector) > 2 else cut


def walk(p, a, b, c):
    """Points of the box at p spanned by a (major), b, c."""
    w, h, d = size(a), size(b), size(c)
    for long, others in ((a, (h, d)), (b, (w, d)), (c, (w, h))):  # straight lines
        if others == (1, 1):
            return [p + i * np.sign(long) for i in range(size(long))]
    a2, b2, c2 = half(a), half(b), half(c)
    da, db, dc = np.sign(a), np.sign(b), np.sign(c)
    if 2 * w > 3 * h and 2 * w > 3 * d:
        return walk(p, a2, b, c) + walk(p + a2, a - a2, b, c)
    if 3 * h > 4 * d:
        return walk(p, b2, c, a2) + walk(p + b2, a, b - b2, c) + walk(p + a - da + b2 - db, -b2, c, a2 - a)
    if 3 * d > 4 * h:
        return walk(p, c2, a2, b) + walk(p + c2, a, b, c - c2) + walk(p + a - da + c2 - dc, -c2, a2 - a, b)
    start = walk(p, b2, c2, a2) + walk(p + b2, c, a2, b - b2) + walk(p + b2 - db + c - dc, a, -b2, c2 - c)
    return start + walk(p + a - da + b2 + c - dc, -c, a2 - a, b - b2) + walk(p + a - da + b2 - db, -b2, c2, a2 - a)


def gilbert_order(frames, height, width):
    """Eq. 1. -> place (N,): where on the curve a token lies; order (N,): token at each place. (t Y + y) X + x."""
    x, y, t = np.array([width, 0, 0]), np.array([0, height, 0]), np.array([0, 0, frames])
    zero = np.zeros(3, dtype=int)
    if width >= height and width >= frames:
        points = walk(zero, x, y, t)
    elif height >= width and height >= frames:
        points = walk(zero, y, x, t)
    else:
        points = walk(zero, t, x, y)
    order = [int((p[2] * height + p[1]) * width + p[0]) for p in points]
    place = [order.index(i) for i in range(len(order))]
    return torch.tensor(place), torch.tensor(order)


def curve_neighbours(frames, height, width, block):
    """Eq. 2-3. -> (n,n) bool."""
    place, order = gilbert_order(frames, height, width)
    n = math.ceil(len(order) / block)
    near = torch.eye(n, dtype=torch.bool)
    cells = [(t, y, x) for t in range(frames) for y in range(height) for x in range(width)]
    for i, one in enumerate(cells):
        for j, two in enumerate(cells):
            if max(abs(u - v) for u, v in zip(one, two, strict=True)) == 1:
                near[int(place[i]) // block, int(place[j]) // block] = True
    return near


def carve(q, k, *, num_text, block, top_k, mass, neighbours):
    """Eq. 4-5. q, k (B,H,T,D), the last num_text of T are text; neighbours (n_i,n_i) -> (B,H,n_i,n) bool."""
    batch, heads, length, d = q.shape
    n, n_i = math.ceil(length / block), (length - num_text) // block
    mask = torch.zeros(batch, heads, n_i, n, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            blocks = [slice(i * block, (i + 1) * block) for i in range(n_i)]
            q_mean, k_mean = ([x[b, h, cut].detach().mean(0) for cut in blocks] for x in (q, k))
            for i in range(n_i):
                p = [float(x) for x in softmax([(q_mean[i] * km).sum() / math.sqrt(d) for km in k_mean])]
                ranked = sorted(range(n_i), key=lambda j, p=p: -p[j])
                below = sum(sum(p[j] for j in ranked[: r + 1]) <= mass for r in range(n_i))
                kept = ranked[: max(top_k, 1 + below)]
                for j in range(n):
                    mask[b, h, i, j] = j in kept or j >= n_i or bool(neighbours[i, j])
    return mask


def attend(q, k, v, mask, *, num_text, block, amp=0.0, keep=None):
    """Eq. 6. amp in base 2: image queries see amp ln 2 on text keys; text queries see everything. keep (B,T)."""
    batch, heads, length, d = q.shape
    image, outs = length - num_text, []
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                seen = [j for j in range(length) if t >= image or mask[b, h, t // block, j // block]]
                seen = [j for j in seen if keep is None or bool(keep[b, j])]
                bias = [amp * math.log(2) if t < image <= j else 0.0 for j in seen]
                s = [(q[b, h, t] * k[b, h, j]).sum() / math.sqrt(d) for j in seen]
                w = softmax([x + a for x, a in zip(s, bias, strict=True)])
                outs.append(sum(a * v[b, h, j] for a, j in zip(w, seen, strict=True)))
    return torch.stack(outs).reshape(batch, heads, length, -1)


def text_amp(reduced, full, scale=1.0):
    """Eq. 7."""
    return -math.log2(math.sqrt(reduced / full)) * scale


def kept_blocks(drop, n_i):
    """Eq. 5. The shipped schedules: drop .75 in the first half of the steps, .85 after."""
    return int((1 - drop) * n_i)
