"""Residual attention in loops; their author saw only an account of the paper, neither code nor test.

Parameters. A batch norm is a pair `bn` (2,C): scale, shift. Frozen (training=False) it is x * scale + shift;
`frozen_bn` makes such a pair from weight, bias and running statistics. With training=True the map is first normalised
by the batch's own statistics, then scaled.
A unit is the tuple (bn1 (2,C), w1 (C/k,C,1,1), bn2, w2 (C/k,C/k,3,3), bn3, w3 (C,C/k,1,1)), k = bottleneck.
A module is a dict:
  pre   list of p units             trunk list of t units
  down  list over levels 1..d of lists of r units        bottom list of r units (r more at the bottom)
  skip  list over levels 1..d-1 of units                 up     list over levels 1..d-1 of lists of r units
  head  (bn4, w4 (C,C,1,1), bn5, w5 (C,C,1,1))           post   list of units (1 in the code)
`skip[i-1]` and `up[i-1]` belong to level i (size of z_i). All maps (B,C,Y,X).
"""

import torch
import torch.nn.functional as F


def frozen_bn(weight, bias, mean, var, eps=1e-5):
    scale = weight / torch.sqrt(var + eps)
    return torch.stack([scale, bias - mean * scale])


def batch_norm(x, bn, *, training=False, eps=1e-5):
    """x (B,C,Y,X), bn (2,C)."""
    B, C, Y, X = x.shape
    planes = []
    for c in range(C):
        u = x[:, c]
        if training:
            n = B * Y * X
            mean = u.sum() / n
            var = ((u - mean) ** 2).sum() / n
            u = (u - mean) / torch.sqrt(var + eps)
        planes.append(u * bn[0, c] + bn[1, c])
    return torch.stack(planes, 1)


def unit(x, params, *, training=False):
    """U(x) = x + W3 relu(bn(W2 relu(bn(W1 relu(bn(x)))))), the shortcut takes the raw x."""
    bn1, w1, bn2, w2, bn3, w3 = params
    h = F.conv2d(torch.relu(batch_norm(x, bn1, training=training)), w1)
    h = F.conv2d(torch.relu(batch_norm(h, bn2, training=training)), w2, padding=1)
    h = F.conv2d(torch.relu(batch_norm(h, bn3, training=training)), w3)
    return x + h


def chain(x, units, *, training=False):
    for u in units:
        x = unit(x, u, training=training)
    return x


def max_pool(x):
    """3x3, stride 2, no padding, CEIL mode: the last window may hang over the edge (only places inside count)."""
    B, C, Y, X = x.shape

    def size(n):
        return -((3 - n) // 2) + 1  # ceil((n - 3) / 2) + 1

    H, W = size(Y), size(X)
    assert H >= 1
    assert W >= 1
    rows = []
    for y in range(H):
        row = []
        for i in range(W):
            row.append(x[:, :, 2 * y : min(2 * y + 3, Y), 2 * i : min(2 * i + 3, X)].reshape(B, C, -1).max(-1).values)
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


def resize(x, Y, X):
    """Bilinear with aligned corners: place i of n' reads i (n - 1) / (n' - 1); n' = 1 reads place 0."""
    h, w = x.shape[2:]

    def at(i, n, m):  # -> low index, high index, weight of the high one
        s = i * (n - 1) / (m - 1) if m > 1 else 0.0
        lo = min(int(s), n - 1)
        return lo, min(lo + 1, n - 1), s - lo

    rows = []
    for y in range(Y):
        y0, y1, fy = at(y, h, Y)
        row = []
        for i in range(X):
            x0, x1, fx = at(i, w, X)
            row.append(
                (1 - fy) * ((1 - fx) * x[:, :, y0, x0] + fx * x[:, :, y0, x1])
                + fy * ((1 - fx) * x[:, :, y1, x0] + fx * x[:, :, y1, x1])
            )
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


def mask_logits(t1, p, *, training=False, size=None):
    """Eq. 2-4: bottom-up, top-down, head. t1 (B,C,Y,X) after the pre-processing units -> logits of `size` (t1's own
    by default)."""
    d = len(p["down"])
    z = [t1]
    for i in range(d):
        z.append(chain(max_pool(z[i]), p["down"][i], training=training))
    u = chain(z[d], p["bottom"], training=training)
    for i in range(d - 1, 0, -1):
        u = resize(u, *z[i].shape[2:]) + unit(z[i], p["skip"][i - 1], training=training)
        u = chain(u, p["up"][i - 1], training=training)
    u = resize(u, *(t1.shape[2:] if size is None else size))
    bn4, w4, bn5, w5 = p["head"]
    u = F.conv2d(torch.relu(batch_norm(u, bn4, training=training)), w4)
    return F.conv2d(torch.relu(batch_norm(u, bn5, training=training)), w5)


def mask_values(logits, kind="sigmoid", *, std_eps=0.0, unbiased=False):
    """The mask activations. "sigmoid": f1, each number. "channel": f2 = u / ||u||_2 over channels at each place.
    "spatial": f3 = sigmoid((u - mean_c) / std_c) over the places of one channel and one sample."""
    B, C, Y, X = logits.shape
    out = torch.empty_like(logits)
    if kind == "sigmoid":
        return 1 / (1 + torch.exp(-logits))
    if kind == "channel":
        for b in range(B):
            for y in range(Y):
                for i in range(X):
                    u = logits[b, :, y, i]
                    out[b, :, y, i] = u / torch.sqrt(sum(u[c] ** 2 for c in range(C)))
        return out
    assert kind == "spatial"
    for b in range(B):
        for c in range(C):
            u = logits[b, c]
            n = Y * X
            mean = u.sum() / n
            var = ((u - mean) ** 2).sum() / (n - 1 if unbiased else n)
            out[b, c] = torch.sigmoid((u - mean) / torch.sqrt(var + std_eps))
    return out


def bottom_up_top_down(t1, p, kind="sigmoid", *, training=False):
    """The whole mask branch: (B,C,Y,X) -> M (B,C,Y,X)."""
    return mask_values(mask_logits(t1, p, training=training), kind)


def soft_mask(trunk, mask, residual=True):
    """F = (1 + M) T, or the "naive" attention M T."""
    return trunk * (1 + mask) if residual else trunk * mask


def residual_attention(x, p, *, mask="sigmoid", residual=True, training=False, none_means="no_branch", parts=False):
    """Eq. 1-5. x (B,C,Y,X) -> (B,C,Y,X); parts=True -> (out, M, T)."""
    t1 = chain(x, p["pre"], training=training)
    T = chain(t1, p["trunk"], training=training)
    if mask == "none" and none_means == "no_branch":
        M, mixed = torch.zeros_like(T), T
    else:
        logits = mask_logits(t1, p, training=training)
        M = logits if mask == "none" else mask_values(logits, mask)
        mixed = soft_mask(T, M, residual)
    out = chain(mixed, p["post"], training=training)
    return (out, M, T) if parts else out


def golden_params(z, case):
    """The dict of a case (A, B, C) from the stored layer names."""
    letter, k = {"A": ("A", 1), "B": ("B", 2), "C": ("C", 3)}[case]
    d = {"A": 3, "B": 2, "C": 1}[case]

    def g(name):
        return z[f"{case}_p_{name}"]

    m = f"Attention{letter}_1/"

    def u(first_bn, name):
        b = name + "branch1/"
        return (
            g(first_bn),
            g(b + "conv1_1x1"),
            g(b + "conv1_1x1/bn"),
            g(b + "conv2_3x3"),
            g(b + "conv2_3x3/bn"),
            g(b + "conv3_1x1"),
        )

    ds, us = m + "mask/down_sample/", m + "mask/up_sample/"
    return {
        "pre": [u(f"pre_res_{k}/bn", m + "trunk/res1/")],
        "trunk": [u(m + "trunk/res1/bn", m + "trunk/res2/"), u(m + "trunk/res2/bn", m + "trunk/res3/")],
        "down": [[u(f"{ds}pool{i}_3x3_s2/bn", f"{ds}res{i}_1/")] for i in range(1, d + 1)],
        "bottom": [u(f"{ds}res{d}_1/bn", f"{ds}res{d}_2/")],
        "skip": [u(f"{ds}res{i}_1/bn", f"{m}mask/skip/res{i}/") for i in range(1, d)],
        "up": [[u(f"{m}mask/up_sample{i}/bn", f"{us}res{i}_1/")] for i in range(1, d)],
        "head": (g(us + "interp_1/bn"), g(m + "mask/linear_1"), g(m + "mask/linear_1/bn"), g(m + "mask/linear_2")),
        "post": [u(m + "fusion/bn", m)],
    }
