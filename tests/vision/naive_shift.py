"""ShiftViT's shift (arXiv 2201.10801) and its block, written out pixel by pixel."""

import math

import torch
from torch import Tensor


def naive_shift(x: Tensor, n_div: int) -> Tensor:
    """x (B, M, Y, X) -> the same. Channel groups of floor(M / n_div): left, right, up, down; the rest stays.

    "Left" means that content moves left: a pixel reads its right neighbour. Zeros come in, nothing wraps around.
    """
    B, M, Y, X = x.shape
    g = M // n_div
    reads = {0: (0, 1), 1: (0, -1), 2: (1, 0), 3: (-1, 0)}
    out = torch.zeros_like(x)
    for b in range(B):
        for c in range(M):
            dy, dx = reads.get(c // g, (0, 0)) if g else (0, 0)
            for y in range(Y):
                for w in range(X):
                    if 0 <= y + dy < Y and 0 <= w + dx < X:
                        out[b, c, y, w] = x[b, c, y + dy, w + dx]
    return out


def naive_shift_block(
    x: Tensor,
    n_div: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
) -> Tensor:
    """s = shift(x); s + MLP(norm(s)). The norm's statistics are over (M, Y, X) of a sample, eps 1e-5; its affine is per
    channel. fc1 (r M, M), GELU by erf, fc2 (M, r M), all pointwise."""
    s = naive_shift(x, n_div)
    B, M, Y, X = s.shape
    out = torch.zeros_like(s)
    for b in range(B):
        mean = s[b].sum() / (M * Y * X)
        spread = torch.sqrt(((s[b] - mean) ** 2).sum() / (M * Y * X) + 1e-5)
        for y in range(Y):
            for w in range(X):
                z = (s[b, :, y, w] - mean) / spread * norm_weight + norm_bias
                z = torch.stack([torch.einsum("i,i->", row, z) for row in fc1_weight]) + fc1_bias
                z = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
                z = torch.stack([torch.einsum("i,i->", row, z) for row in fc2_weight]) + fc2_bias
                out[b, :, y, w] = s[b, :, y, w] + z
    return out
