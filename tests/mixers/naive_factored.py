"""Factored attention and its wave function in loops; their author has read neither the code nor a test of it."""

import math

import torch

from naive import linear


def expand(table, grid):
    """Translation-invariant table (H,n) -> alpha (H,n,n); grid (Y,X), periodic, or (n,) in one dimension (eq. 2)."""
    n = table.shape[1]
    out = []
    for h in range(table.shape[0]):
        for i in range(n):
            for j in range(n):
                if len(grid) == 1:
                    out.append(table[h, (j - i) % n])
                else:
                    rows, cols = grid
                    dy, dx = j // cols - i // cols, j % cols - i % cols
                    out.append(table[h, (dy % rows) * cols + dx % cols])
    return torch.stack(out).reshape(table.shape[0], n, n)


def factored(x, alpha, wv, bv, wo, bo, causal=False):
    """x (B,n,M), alpha (H,n,n), weights (out, in) -> (B,n,M). No softmax, no scale."""
    batch, n, m = x.shape
    heads = alpha.shape[0]
    d = m // heads
    rows = []
    for b in range(batch):
        v = [linear(x[b, j], wv, bv) for j in range(n)]
        for i in range(n):
            parts = []
            for h in range(heads):
                y = 0
                for j in range(n):
                    if j <= i or not causal:
                        y = y + alpha[h, i, j] * v[j][h * d : (h + 1) * d]
                parts.append(y)
            rows.append(linear(torch.cat(parts), wo, bo))
    return torch.stack(rows).reshape(x.shape)


def norm(x, weight, bias, eps=1e-6):
    mean = x.sum() / x.shape[0]
    return (x - mean) / torch.sqrt(((x - mean) ** 2).sum() / x.shape[0] + eps) * weight + bias


def log_psi(spins, p, side, patch, blocks, grid):
    """spins (B, side*side) -> complex (B,). p: parameters by the flax names of the account; kernels (in, out)."""

    def dense(x, name):
        return linear(x, p[name + ".kernel"].T, p[name + ".bias"])

    def ln(x, name):
        return norm(x, p[name + ".scale"], p[name + ".bias"])

    out, across = [], side // patch
    for s in spins:
        x = []
        for big in range(across * across):
            y0, x0 = big // across * patch, big % across * patch
            x.append(
                dense(
                    torch.stack([s[(y0 + c // patch) * side + x0 + c % patch] for c in range(patch * patch)]),
                    "Embed_0.embed",
                )
            )
        for layer in range(blocks):
            e = f"Encoder_0.layers_{layer}."
            alpha = expand(p[e + "attn.alpha"], grid)
            y = factored(
                torch.stack([ln(t, e + "layer_norm_1") for t in x])[None],
                alpha,
                p[e + "attn.v.kernel"].T,
                p[e + "attn.v.bias"],
                p[e + "attn.W.kernel"].T,
                p[e + "attn.W.bias"],
            )[0]
            x = [t + y[i] for i, t in enumerate(x)]
            x = [
                t
                + dense(
                    torch.nn.functional.gelu(dense(ln(t, e + "layer_norm_2"), e + "ff.layers_0"), approximate="tanh"),
                    e + "ff.layers_2",
                )
                for t in x
            ]
        z = ln(sum(x), "OuputHead_0.out_layer_norm")
        re = ln(dense(z, "OuputHead_0.output_layer0"), "OuputHead_0.norm2")
        im = ln(dense(z, "OuputHead_0.output_layer1"), "OuputHead_0.norm3")
        total = 0
        for a in range(z.shape[0]):
            o = torch.complex(re[a], im[a])
            t = o if float(re[a].detach()) >= 0 else -o
            total = total + t + torch.log(1 + torch.exp(-2 * t)) - math.log(2)
        out.append(total)
    return torch.stack(out)
