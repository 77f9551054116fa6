"""Attentive convolution in loops: one generated kernel per sample and channel.

Written from the equations alone; its author has read neither code nor test of the library.
"""

import math

import torch

from naive import linear


def gelu(z, form="erf"):
    if form == "tanh":
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))


def one_by_one(x, w, b=None):
    """1x1 convolution. x (B,C,Y,X), w (C',C)."""
    batch, _, height, width = x.shape
    cells = [linear(x[i, :, y, c], w, b) for i in range(batch) for y in range(height) for c in range(width)]
    return torch.stack(cells).reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def span(i, size, cells):
    """Cells of adaptive pooling: floor(i size / cells) .. ceil((i+1) size / cells) - 1."""
    return range(i * size // cells, -(-(i + 1) * size // cells))


def pooled(a, k, pool, keep=None):
    """Eq. 2. a (Y,X) of one channel, keep (Y,X) -> k*k numbers. A cell without any real position gives 0."""
    height, width = a.shape
    out = []
    for i in range(k * k):
        if pool == "raster":  # the flattened map cut in k*k runs
            places = [(p // width, p % width) for p in span(i, height * width, k * k)]
        else:  # "grid": a k x k grid of cells
            places = [(y, c) for y in span(i // k, height, k) for c in span(i % k, width, k)]
        real = [a[y, c] for y, c in places if keep is None or bool(keep[y, c])]
        out.append(sum(real) / len(real) if real else a.new_zeros(()))
    return torch.stack(out)


def generate_kernels(x, wk, bk, wg, bg, d, k, *, form="erf", pool="raster", keep=None):
    """Eq. 1-4. x (B,C,Y,X), wk (C,C), wg (K,K), d (C,), keep (B,Y,X) -> kernels (B,C,k,k)."""
    a = one_by_one(x, wk, bk)
    out = []
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            s = pooled(a[b, c], k, pool, None if keep is None else keep[b])
            g = linear(gelu(s, form), wg, bg)  # eq. 3: along the taps, the same map for all channels
            out.append(g - torch.sigmoid(d[c]) * sum(g) / len(g))  # eq. 4
    return torch.stack(out).reshape(x.shape[0], x.shape[1], k, k)


def attentive_convolution(values, kernels):
    """Eq. 6. values (B,C,Y,X), kernels (B,C,k,k); zero padding, cross-correlation."""
    batch, channels, height, width = values.shape
    k = kernels.shape[-1]
    out = []
    for b in range(batch):
        for c in range(channels):
            for y in range(height):
                for x in range(width):
                    total = values.new_zeros(())
                    for i in range(k):
                        for j in range(k):
                            yy, xx = y + i - k // 2, x + j - k // 2
                            if 0 <= yy < height and 0 <= xx < width:
                                total = total + kernels[b, c, i, j] * values[b, c, yy, xx]
                    out.append(total)
    return torch.stack(out).reshape(values.shape)


def attentive_conv(x, p, k=3, *, form="erf", pool="raster", keep=None):
    """Eq. 1-7. p: wk, bk, wg, bg, d, wv, bv, wo, bo (biases may be None). keep (B,Y,X) true = real.

    Padded cells are left out of the means and are 0 among the values -> out (B,C,Y,X), kernels.
    """
    kernels = generate_kernels(x, p["wk"], p["bk"], p["wg"], p["bg"], p["d"], k, form=form, pool=pool, keep=keep)
    v = one_by_one(x, p["wv"], p["bv"])  # eq. 5
    if keep is not None:
        v = torch.where(keep[:, None], v, torch.zeros_like(v))
    return one_by_one(attentive_convolution(v, kernels), p["wo"], p["bo"]), kernels  # eq. 7


# Doubts: a pooling cell of padding only is given 0 here; outputs at padded cells are not zeroed.
