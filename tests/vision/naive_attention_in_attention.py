"""A2N, attention in attention: loops over samples and pixels.

Their author saw only the paper's account, neither code nor test of the library.
"""

import torch
import torch.nn.functional as F

from vision.naive_pixel_attention import bilinear_up, leaky, pixel_gate, upsampling_stage


def branch_weights(x, p1_weight, w1, w2, *, temperature=30.0, slope=0.2):
    """Equations 1 to 3. x (B,C,Y,X), p1_weight (C,C,1,1), w1 (C/r, C), w2 (2, C/r) -> a (B,2);
    column 0 attention branch, column 1 plain branch."""
    h = leaky(F.conv2d(x, p1_weight), slope)
    a = []
    for b in range(x.shape[0]):
        s = torch.stack([h[b, c].mean() for c in range(h.shape[1])])  # mean of h, not of x
        z = w2 @ torch.relu(w1 @ s) / temperature
        e = torch.exp(z - z.max().detach())
        a.append(e / e.sum())
    return torch.stack(a)


def attention_branch(h, k1_weight, k2_weight, k2_bias, k3_weight, k4_weight, *, slope=0.2):
    """Equation 4: K4 * ((K3 * h) . sigmoid(K2 l(K1 * h) + b2)). h (B,C,Y,X); k1, k3, k4 (C,C,3,3); k2 (C,C,1,1)."""
    pad = k1_weight.shape[-1] // 2
    gate = pixel_gate(leaky(F.conv2d(h, k1_weight, padding=pad), slope), k2_weight, k2_bias)
    return F.conv2d(F.conv2d(h, k3_weight, padding=pad) * gate, k4_weight, padding=pad)


def attention_in_attention(
    x,
    p1_weight,
    w1,
    w2,
    k1_weight,
    k2_weight,
    k2_bias,
    k3_weight,
    k4_weight,
    k5_weight,
    p2_weight,
    *,
    temperature=30.0,
    slope=0.2,
):
    """Equations 1 to 6, residual inside. k5_weight (C,C,3,3) for A2N, (C,C,1,1) for A2N-M; p2_weight (C,C,1,1).
    (B,C,Y,X) -> (B,C,Y,X)."""
    h = leaky(F.conv2d(x, p1_weight), slope)
    a = branch_weights(x, p1_weight, w1, w2, temperature=temperature, slope=slope)
    A = attention_branch(h, k1_weight, k2_weight, k2_bias, k3_weight, k4_weight, slope=slope)
    N = F.conv2d(h, k5_weight, padding=k5_weight.shape[-1] // 2)
    blend = torch.stack([a[b, 0] * A[b] + a[b, 1] * N[b] for b in range(x.shape[0])])
    return x + F.conv2d(leaky(blend, slope), p2_weight)


def a2n(
    image,
    scale,
    first_weight,
    first_bias,
    blocks,
    trunk_weight,
    trunk_bias,
    stages,
    last_weight,
    last_bias,
    *,
    temperature=30.0,
    slope=0.2,
):
    """image (B,3,Y,X) -> (B,3,sY,sX). blocks: list of the ten tensors of `attention_in_attention`;
    stages: list of the six tensors of `upsampling_stage`, two for scale 4 (x2 each), one for 2 or 3."""
    f0 = F.conv2d(image, first_weight, first_bias, padding=1)
    t = f0
    for weights in blocks:
        t = attention_in_attention(t, *weights, temperature=temperature, slope=slope)
    f = f0 + F.conv2d(t, trunk_weight, trunk_bias, padding=1)
    for s, weights in zip((2, 2) if scale == 4 else (scale,), stages, strict=True):
        f = upsampling_stage(f, s, *weights, slope=slope)
    return F.conv2d(f, last_weight, last_bias, padding=1) + bilinear_up(image, scale)


def parameter_counts(dim=40, up_dim=24, blocks=16, scale=4, reduction=4, plain_kernel=3, channels=3):
    """Parameters of the host by formula (account: x4 1,047,459; M 842,659; x2 1,036,443)."""
    C, U = dim, up_dim
    block = 2 * C * C + C * C // reduction + 2 * C // reduction + 3 * 9 * C * C + C * C + C + plain_kernel**2 * C * C

    def stage(c):
        return 9 * c * U + U + U * U + U + 9 * U * U + U

    return (
        9 * channels * C
        + C
        + blocks * block
        + 9 * C * C
        + C
        + stage(C)
        + (stage(U) if scale == 4 else 0)
        + 9 * U * channels
        + channels
    )
