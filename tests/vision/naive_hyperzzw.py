"""HyperZZW's parts, number by number. Their author has read neither code nor test."""

import itertools
import math

import torch


def linear(z, w, b=None):
    """w (out, in, ...) with trailing axes of size 1."""
    y = torch.stack([(row.reshape(-1) * z).sum() for row in w])
    return y if b is None else y + b


def gelu(z):
    return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))


def standardise(values, eps=1e-5):
    """All entries of one tensor: mean 0, biased variance 1."""
    return (values - values.mean()) / torch.sqrt(((values - values.mean()) ** 2).mean() + eps)


def per_map(x):
    """IN without affine: every (sample, channel) map on its own. x (B,C,Y,X)."""
    return torch.stack([torch.stack([standardise(m) for m in s]) for s in x])


def grid_coordinates(*sizes):
    """Points of [-1,1]^n, row-major, as (n, *sizes)."""
    points = list(itertools.product(*[[-1 + 2 * i / (s - 1) for i in range(s)] for s in sizes]))
    return torch.tensor(points, dtype=torch.float64).T.reshape(len(sizes), *sizes)


def slow_network(coords, p, context=None, alpha=1.0, beta=0.1):
    """The slow network, and with context (hidden, points) the local one. coords (n, *grid) -> W (out, *grid).

    p: filters [(F, b)] of L+1 layers, linears [(L, b)] of L, output (W, b), bias (*grid), with a context fast [(M, b)].
    """
    grid = coords.shape[1:]
    points = coords.reshape(coords.shape[0], -1)
    n = points.shape[1]
    shift = p["bias"].reshape(-1)
    h = [torch.sin(linear(points[:, j], *p["filters"][0])) for j in range(n)]
    for i, mix in enumerate(p["linears"]):
        wave = [torch.sin(linear(points[:, j], *p["filters"][i + 1])) for j in range(n)]
        h = [wave[j] * linear(h[j], *mix) + shift[j] for j in range(n)]
        if context is not None:
            size = torch.sqrt(sum(z**2 for z in h))  # one norm per hidden channel over the grid
            h = [alpha * z.detach() + beta * z / size for z in h]
            h = [h[j] * linear(context[:, j], *p["fast"][i]) for j in range(n)]
    return torch.stack([linear(z, *p["output"]) for z in h]).T.reshape(-1, *grid)


def global_branch(x, z, kernel):
    """x, z (B,C,S,S), kernel (C,S,S): K = x * W, out = K @ z over the spatial axes."""
    out, size = [], x.shape[-1]
    for b, c, y, j in itertools.product(*map(range, x.shape)):
        out.append(sum(x[b, c, y, i] * kernel[c, y, i] * z[b, c, i, j] for i in range(size)))
    return torch.stack(out).reshape(x.shape)


def one_by_one(x, w, b=None):
    """1x1 convolution. x (B,C,Y,X)."""
    rows = [linear(x[i, :, y, c], w, b) for i in range(len(x)) for y in range(x.shape[2]) for c in range(x.shape[3])]
    return torch.stack(rows).reshape(len(x), x.shape[2], x.shape[3], -1).permute(0, 3, 1, 2)


def rgu(v, ly, lk, lq, lv, bias_map):
    """RGU(v) = Ly(gelu(IN(Lk v * Lq(Lv v))) + bias map); each of ly .. lv: (weight, bias)."""
    return one_by_one(gelu(per_map(one_by_one(v, *lk) * one_by_one(one_by_one(v, *lv), *lq))) + bias_map, *ly)


def pool(m, k):
    """Adaptive average of one map (Y,X) to (k,k): cells floor(iY/k) .. ceil((i+1)Y/k) - 1."""
    y0, x0 = ([i * s // k for i in range(k)] for s in m.shape)
    y1, x1 = ([-(-(i + 1) * s // k) for i in range(k)] for s in m.shape)
    return torch.stack([m[y0[i] : y1[i], x0[j] : x1[j]].mean() for i in range(k) for j in range(k)])


def local_kernel(x1, k, p):
    """c = gelu(L1 mean over the batch of Lr pool(x1)) -> W (C,k,k). p adds reduce, fc1 (weight, bias)."""
    pooled = torch.stack([torch.stack([pool(m, k) for m in s]) for s in x1])  # (B,C,k*k)
    columns = []
    for j in range(k * k):
        c = sum(linear(pooled[b, :, j], *p["reduce"]) for b in range(len(x1))) / len(x1)
        columns.append(gelu(linear(c, *p["fc1"])))
    return slow_network(grid_coordinates(k, k), p, torch.stack(columns).T)


def local_branch(x2, kernel, mix, bias=0.0):
    """gelu(BN(Lc dwconv(x2, W))) + bias, zero padding, batch statistics without affine. kernel (C,k,k)."""
    out, k = [], kernel.shape[-1]
    for b, c, y, x in itertools.product(*map(range, x2.shape)):
        taps = [(i, j, y + i - (k - 1) // 2, x + j - (k - 1) // 2) for i in range(k) for j in range(k)]
        inside = [q for q in taps if 0 <= q[2] < x2.shape[2] and 0 <= q[3] < x2.shape[3]]
        out.append(sum(kernel[c, i, j] * x2[b, c, yy, xx] for i, j, yy, xx in inside))
    u = one_by_one(torch.stack(out).reshape(x2.shape), *mix)
    return gelu(torch.stack([standardise(u[:, c]) for c in range(u.shape[1])]).transpose(0, 1)) + bias


def channel_gate(x, kernel):
    """kernel (C,): x * sigmoid(W y^2), y the global mean of each channel."""
    n = range(x.shape[1])
    return torch.stack([torch.stack([s[c] * torch.sigmoid(kernel[c] * s[c].mean() ** 2) for c in n]) for s in x])


def hyper_interaction(y, x, kernel_c, kernel_s):
    """kernel_c (C,), kernel_s (Y,X): x * sigmoid(s_c s_s), both made from y."""
    out = []
    for b in range(len(x)):
        s_s = kernel_s * (sum(y[b, c] for c in range(y.shape[1])) / y.shape[1]) ** 2
        s_c = [kernel_c[c] * y[b, c].mean() ** 2 for c in range(x.shape[1])]
        out.append(torch.stack([x[b, c] * torch.sigmoid(s_c[c] * s_s) for c in range(x.shape[1])]))
    return torch.stack(out)
