"""Pixel attention, SC-PA, U-PA and PAN: loops over pixels.

Their author saw only the paper's account, neither code nor test of the library.
"""

import torch
import torch.nn.functional as F


def leaky(z, slope=0.2):
    return torch.where(z > 0, z, slope * z)


def pixel_gate(x, weight, bias):
    """sigmoid(W x + b) at every pixel. x (B,C,Y,X), weight (C,C[,1,1]), bias (C,) -> (B,C,Y,X) in (0,1)."""
    W = weight.reshape(weight.shape[0], -1)
    B, _, Y, X = x.shape
    rows = []
    for y in range(Y):
        cols = []
        for z in range(X):
            cols.append(torch.stack([1 / (1 + torch.exp(-(W @ x[b, :, y, z] + bias))) for b in range(B)]))
        rows.append(torch.stack(cols, dim=-1))
    return torch.stack(rows, dim=-2)


def pixel_attention(x, weight, bias):
    """Equation 1: y = x . sigmoid(W x + b)."""
    return x * pixel_gate(x, weight, bias)


def pixel_attention_conv(u, k2_weight, k2_bias, k3_weight, k4_weight):
    """Equation 2: z = K4 * ((K3 * u) . sigmoid(K2 u + b2)). u (B,C',Y,X); k2 1x1, k3, k4 (C',C',3,3) no bias."""
    gate = pixel_gate(u, k2_weight, k2_bias)  # from u
    gated = F.conv2d(u, k3_weight, padding=1) * gate  # the gated thing is K3 * u
    return F.conv2d(gated, k4_weight, padding=1)


def self_calibrated_pixel_attention(
    x, a_weight, b_weight, k1_weight, k2_weight, k2_bias, k3_weight, k4_weight, p3_weight, *, dilation=1, slope=0.2
):
    """Equations 3 to 6 (SC-PA). x (B,C,Y,X); a_weight, b_weight (C/reduction, C, 1, 1); k1, k3, k4
    (C', C', 3, 3); k2 (C', C', 1, 1) with bias; p3_weight (C, 2C', 1, 1) -> (B,C,Y,X)."""
    # OPEN: [a'; z'] has 2C' channels while p3 is built for reduction*C': only reduction = 2 fits (released code too).
    a = leaky(F.conv2d(x, a_weight), slope)
    u = leaky(F.conv2d(x, b_weight), slope)
    a = leaky(F.conv2d(a, k1_weight, padding=dilation, dilation=dilation), slope)  # only K1 is dilated
    z = leaky(pixel_attention_conv(u, k2_weight, k2_bias, k3_weight, k4_weight), slope)
    return x + F.conv2d(torch.cat([a, z], dim=1), p3_weight)  # no activation after the sum


def nearest_up(x, s):
    """(B,C,Y,X) -> (B,C,sY,sX), each pixel repeated s by s times."""
    Y, X = x.shape[2:]
    return torch.stack([torch.stack([x[:, :, y // s, z // s] for z in range(s * X)], -1) for y in range(s * Y)], -2)


def bilinear_up(x, s):
    """(B,C,Y,X) -> (B,C,sY,sX), align_corners False: source coordinate (p + 1/2)/s - 1/2 clamped at 0."""
    Y, X = x.shape[2:]

    def taps(p, n):
        c = max((p + 0.5) / s - 0.5, 0.0)
        i = int(c)
        return i, min(i + 1, n - 1), c - i

    rows = []
    for y in range(s * Y):
        y0, y1, fy = taps(y, Y)
        row = []
        for z in range(s * X):
            x0, x1, fx = taps(z, X)
            row.append(
                (1 - fy) * ((1 - fx) * x[:, :, y0, x0] + fx * x[:, :, y0, x1])
                + fy * ((1 - fx) * x[:, :, y1, x0] + fx * x[:, :, y1, x1])
            )
        rows.append(torch.stack(row, dim=-1))
    return torch.stack(rows, dim=-2)


def upsampling_stage(f, s, up_weight, up_bias, pa_weight, pa_bias, hr_weight, hr_bias, *, slope=0.2):
    """Equation 7, one stage: f = l(PA(W1 * nearest_up(f, s))); f = l(W2 * f). (B,C,Y,X) -> (B,U,sY,sX).
    up_weight (U,C,3,3), hr_weight (U,U,3,3), both with bias; pa_weight (U,U,1,1), pa_bias (U,)."""
    f = F.conv2d(nearest_up(f, s), up_weight, up_bias, padding=1)
    f = leaky(pixel_attention(f, pa_weight, pa_bias), slope)  # activation after the gate
    return leaky(F.conv2d(f, hr_weight, hr_bias, padding=1), slope)


def upsampling_pixel_attention(f, scale, stages, *, slope=0.2):
    """U-PA. scale 4: two stages with s = 2 each; scale 2 or 3: one stage with s = scale.
    stages: list of the six tensors of `upsampling_stage` for each stage."""
    if scale == 4:
        assert len(stages) == 2
        steps = (2, 2)
    else:
        assert len(stages) == 1
        steps = (scale,)
    for s, weights in zip(steps, stages):
        f = upsampling_stage(f, s, *weights, slope=slope)
    return f


def pan(
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
    slope=0.2,
):
    """Equation 8. image (B,I,Y,X) -> (B,O,sY,sX), I = O. blocks: list of the eight weight tensors of
    `self_calibrated_pixel_attention`; stages as in `upsampling_pixel_attention`; first, trunk, last 3x3 with bias."""
    f0 = F.conv2d(image, first_weight, first_bias, padding=1)
    t = f0
    for weights in blocks:
        t = self_calibrated_pixel_attention(t, *weights, slope=slope)
    f = f0 + F.conv2d(t, trunk_weight, trunk_bias, padding=1)
    f = upsampling_pixel_attention(f, scale, stages, slope=slope)
    return F.conv2d(f, last_weight, last_bias, padding=1) + bilinear_up(image, scale)


def parameter_counts(dim=40, up_dim=24, blocks=16, scale=4, channels=3):
    """Parameters of PAN, by formula; PA alone: C^2 + C."""
    h = dim // 2
    block = 2 * dim * h + 3 * 9 * h * h + h * h + h + dim * 2 * h
    first = 9 * channels * dim + dim
    trunk = 9 * dim * dim + dim

    def stage(c):
        return 9 * c * up_dim + up_dim + up_dim**2 + up_dim + 9 * up_dim**2 + up_dim

    ups = stage(dim) + (stage(up_dim) if scale == 4 else 0)
    return first + blocks * block + trunk + ups + 9 * up_dim * channels + channels
