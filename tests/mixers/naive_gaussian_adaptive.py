"""Gaussian adaptive attention line by line, and its block.

Written from the equations alone; its author has read neither code nor test of the library.
"""

import math

import torch


def line_weights(x, offsets, widths, eps=1e-8, keep=None, padding_value=None, mixture=False, clamp=True):
    """Eq. 1-3 on one line x (n,). offsets, widths (K,).

    keep (n,) true = real: padded entries are left out of statistics and sum, weight 0 (no real entry: all 0).
    padding_value: the code's form: such entries are 0 in mean and variance, counted in n, and enter the sum.
    mixture: sum of the K densities in place of their product (inferred option). clamp False: weights always sum to 1.
    """
    n = len(x)
    real = [j for j in range(n) if keep is None or bool(keep[j])]
    if not real:
        return torch.zeros_like(x)
    used = [x[j] * 0 if padding_value is not None and float(x[j].detach()) == padding_value else x[j] for j in real]
    mean = sum(used) / len(used)
    if len(used) == 1:
        var = torch.zeros_like(mean) + eps
    else:
        var = sum((z - mean) ** 2 for z in used) / (len(used) - 1) + eps  # eq. 1, unbiased
    logs = []
    for j in real:  # eq. 2, in logarithms
        z = [(x[j] - mean - d) / torch.sqrt(var) for d in offsets]
        logp = [-(a**2) / (2 * c**2) - 0.5 * torch.log(2 * math.pi * c**2) for a, c in zip(z, widths, strict=True)]
        logs.append(torch.logsumexp(torch.stack(logp), 0) if mixture else sum(logp))
    logs = torch.stack(logs)
    total = torch.logsumexp(logs, 0)  # eq. 3: w / max(sum of w, eps)
    p = torch.exp(logs - (total if not clamp or float(total.detach()) > math.log(eps) else math.log(eps)))
    return torch.stack([p[real.index(j)] if j in real else x.new_zeros(()) for j in range(n)])


def chunks(n, heads):
    """Contiguous chunks of n // H; the last head takes the remainder."""
    size = n // heads
    return [(h * size, n if h == heads - 1 else (h + 1) * size) for h in range(heads)]


def gaussian_weights(x, axis, offsets, widths, *, keep=None, padding_value=None, mixture=False, clamp=True):
    """x any shape, offsets, widths (H,K), keep like x or None -> weights like x."""
    moved = x.movedim(axis, -1)
    lines = moved.reshape(-1, moved.shape[-1])
    masks = None if keep is None else keep.expand(x.shape).movedim(axis, -1).reshape(lines.shape)
    rows = []
    for i, line in enumerate(lines):
        parts = []
        for h, (a, b) in enumerate(chunks(len(line), len(offsets))):
            on = None if masks is None else masks[i, a:b]
            parts.append(line_weights(line[a:b], offsets[h], widths[h], 1e-8, on, padding_value, mixture, clamp))
        rows.append(torch.cat(parts))
    return torch.stack(rows).reshape(moved.shape).movedim(-1, axis)


def gaam(x, axis, offsets, widths, *, keep=None, padding_value=None, mixture=False, clamp=True):
    """Eq. 4 -> y, weights. padding_value: entries equal to it are returned unchanged."""
    w = gaussian_weights(x, axis, offsets, widths, keep=keep, padding_value=padding_value, mixture=mixture, clamp=clamp)
    y = x * w
    if padding_value is not None:
        y = torch.where(x.detach() == padding_value, x, y)
    return y, w


def gaussian_block(x, layers):
    """layers: list of (axis, offsets (H,K), widths (H,K)): x <- x + layer(x)."""
    for axis, offsets, widths in layers:
        x = x + gaam(x, axis, offsets, widths)[0]
    return x


def merged(offsets, widths):
    """K densities of one head written as one: 1/c^2 = sum 1/c_i^2, d = c^2 sum d_i / c_i^2."""
    c2 = 1 / sum(1 / c**2 for c in widths)
    return c2 * sum(d / c**2 for d, c in zip(offsets, widths, strict=True)), torch.sqrt(c2)


# Doubts: a line with one real entry under keep has weight 1 before the clamp. The clamp decides where all densities of
# a line stay under 1e-8, as in one line of the authors' padded case.
