"""Large kernel attention (arXiv 2202.09741), written out pixel by pixel."""

import math

import torch
from torch import Tensor


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """x (B, M, Y, X), weight (M, 1, k, k), bias (M); zeros outside the map."""
    B, M, Y, X = x.shape
    k = weight.shape[-1]
    out = torch.zeros_like(x)
    for b in range(B):
        for c in range(M):
            for y in range(Y):
                for w in range(X):
                    total = bias[c]
                    for i in range(k):
                        for j in range(k):
                            yy, ww = y + (i - k // 2) * dilation, w + (j - k // 2) * dilation
                            if 0 <= yy < Y and 0 <= ww < X:
                                total = total + weight[c, 0, i, j] * x[b, c, yy, ww]
                    out[b, c, y, w] = total
    return out


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, M, Y, X), weight (out, M, 1, 1), bias (out)."""
    B, _, Y, X = x.shape
    out = x.new_zeros(B, weight.shape[0], Y, X)
    for b in range(B):
        for y in range(Y):
            for w in range(X):
                for c in range(weight.shape[0]):
                    out[b, c, y, w] = torch.einsum("m,m->", weight[c, :, 0, 0], x[b, :, y, w]) + bias[c]
    return out


def naive_large_kernel(
    x: Tensor,
    near_weight: Tensor,
    near_bias: Tensor,
    far_weight: Tensor,
    far_bias: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor,
    dilation: int = 3,
) -> Tensor:
    """x (B, M, Y, X) -> the same: A * x with A = Conv1x1(DW-dilated(DW(x))).

    near (M, 1, 5, 5), far (M, 1, 7, 7) with `dilation`, mix (M, M, 1, 1), each with its bias (M). Any odd kernel sizes.
    """
    near = _depthwise(x, near_weight, near_bias, 1)
    far = _depthwise(near, far_weight, far_bias, dilation)
    return _pointwise(far, mix_weight, mix_bias) * x


def naive_van_attention(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    near_weight: Tensor,
    near_bias: Tensor,
    far_weight: Tensor,
    far_bias: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    dilation: int = 3,
) -> Tensor:
    """VAN's attention module: x + P2(LKA(GELU(P1(x)))), P1 and P2 (M, M, 1, 1) with bias, GELU by erf."""
    z = _pointwise(x, in_weight, in_bias)
    z = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    z = naive_large_kernel(z, near_weight, near_bias, far_weight, far_bias, mix_weight, mix_bias, dilation)
    return x + _pointwise(z, out_weight, out_bias)
