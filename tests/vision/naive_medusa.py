"""A003 MEDUSA: one encoder-decoder attention body, heads at several scales (Aboutalebi et al.; arXiv 2110.06063), naive
oracle.

Only the abstract could be read: everything here follows the account's equations, which are recalled (R) or inferred
(I).
Plain convolutions by torch.nn.functional, resizing by loops. A norm is a tuple (weight, bias, running_mean,
running_var)
(batch norm), (weight, bias) (instance norm per sample and channel, affine) or None.
"""

import torch
import torch.nn.functional as F


def sigmoid(z):
    return 1 / (1 + torch.exp(-z))


def norm(x, params, *, training=False, eps=1e-5):
    """None: no norm. Four tensors: batch norm. Two tensors: instance norm."""
    # OPEN: norm and activation of the body are not known.
    if params is None:
        return x
    B, C = x.shape[:2]
    weight, bias = params[0], params[1]
    if len(params) == 2:
        return torch.stack(
            [
                torch.stack(
                    [
                        weight[c]
                        * (x[b, c] - x[b, c].mean())
                        / torch.sqrt(((x[b, c] - x[b, c].mean()) ** 2).mean() + eps)
                        + bias[c]
                        for c in range(C)
                    ]
                )
                for b in range(B)
            ]
        )
    out = []
    for c in range(C):
        m, s = (x[:, c].mean(), ((x[:, c] - x[:, c].mean()) ** 2).mean()) if training else (params[2][c], params[3][c])
        out.append(weight[c] * (x[:, c] - m) / torch.sqrt(s + eps) + bias[c])
    return torch.stack(out, dim=1)


def conv_norm_relu(x, weight, bias, norm_params, *, training=False):
    """3x3 convolution, same size, norm, ReLU."""
    return torch.relu(norm(F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2), norm_params, training=training))


def pool_2x2(x, kind="max"):
    """(B,C,Y,X) -> (B,C,Y//2,X//2); kind "max" or "mean"."""
    # OPEN: the account says "pool by 2"; max (as in a U-Net) is the default here.
    _B, _C, Y, X = x.shape
    rows = []
    for i in range(Y // 2):
        row = []
        for j in range(X // 2):
            cell = torch.stack([x[:, :, 2 * i + a, 2 * j + b] for a in (0, 1) for b in (0, 1)])
            row.append(cell.max(dim=0).values if kind == "max" else cell.mean(dim=0))
        rows.append(torch.stack(row, dim=-1))
    return torch.stack(rows, dim=-2)


def bilinear(x, size):
    """(B,C,Y,X) -> (B,C,*size), no antialiasing, align_corners False: source = (p + 1/2) Y/Y_l - 1/2, clamped below
    at 0,
    neighbours clamped to the map. (Equals F.interpolate(mode="bilinear").)"""
    _B, _C, Y, X = x.shape

    def taps(p, n, m):
        c = max((p + 0.5) * n / m - 0.5, 0.0)
        i = min(int(c), n - 1)
        return i, min(i + 1, n - 1), c - i

    rows = []
    for y in range(size[0]):
        y0, y1, fy = taps(y, Y, size[0])
        row = []
        for z in range(size[1]):
            x0, x1, fx = taps(z, X, size[1])
            row.append(
                (1 - fy) * ((1 - fx) * x[:, :, y0, x0] + fx * x[:, :, y0, x1])
                + fy * ((1 - fx) * x[:, :, y1, x0] + fx * x[:, :, y1, x1])
            )
        rows.append(torch.stack(row, dim=-1))
    return torch.stack(rows, dim=-2)


def area(x, size):
    """Option for large factors: mean over the pixels of each cell, cell p = [floor(p n/m), ceil((p+1) n/m)) (adaptive
    average pooling)."""
    _B, _C, Y, X = x.shape

    def cell(p, n, m):
        return range(p * n // m, -(-(p + 1) * n // m))

    rows = []
    for y in range(size[0]):
        row = []
        for z in range(size[1]):
            pixels = [x[:, :, i, j] for i in cell(y, Y, size[0]) for j in cell(z, X, size[1])]
            row.append(sum(pixels) / len(pixels))
        rows.append(torch.stack(row, dim=-1))
    return torch.stack(rows, dim=-2)


def global_attention_body(image, encoder, decoder, out_weight, out_bias, *, pool="max", up="bilinear", training=False):
    """Equation 1, U-shaped: image (B,I,Y,X) -> S (B,G,Y,X).

    encoder: list over levels (widths w_0, w_1, ...) of (weight (w_l, w_{l-1}, 3, 3), bias, norm): conv, norm, ReLU; a
    pool by 2 between levels. decoder: list from the coarsest level up, of (weight (w_l, w_{l+1} + w_l, 3, 3), bias,
    norm):
    upsample to the skip's size, concatenate [upsampled ; skip], conv, norm, ReLU. out 1x1 or 3x3 (G, w_0, k, k), no
    activation."""
    # OPEN: one conv for each level (a U-Net has two), bilinear or nearest upsampling, order of the concatenation,
    # kernel
    # of the last conv and whether the body sees the image or the stem's map are choices.
    skips, h = [], image
    for level, weights in enumerate(encoder):
        if level > 0:
            h = pool_2x2(h, pool)
        h = conv_norm_relu(h, *weights, training=training)
        skips.append(h)
    skips.pop()
    for weights in decoder:
        skip = skips.pop()
        size = skip.shape[-2:]
        if up == "bilinear":
            h = bilinear(h, size)
        else:  # nearest: pixel floor(p n / m)
            h = torch.stack(
                [
                    torch.stack(
                        [h[:, :, y * h.shape[2] // size[0], z * h.shape[3] // size[1]] for z in range(size[1])], -1
                    )
                    for y in range(size[0])
                ],
                -2,
            )
        h = conv_norm_relu(torch.cat([h, skip], dim=1), *weights, training=training)
    return F.conv2d(h, out_weight, out_bias, padding=out_weight.shape[-1] // 2)


def scale_gate(S, size, convs, *, resize="bilinear"):
    """Equations 2, 3: A_l = sigmoid(head_l(resize(S, size))). S (B,G,Y,X); convs: list of (weight, bias), one or
    two, ReLU
    between them; last with 1 or C_l outputs -> (B, 1 or C_l, *size)."""
    h = bilinear(S, size) if resize == "bilinear" else area(S, size)  # resize FIRST, then the head at its scale
    for n, (weight, bias) in enumerate(convs):
        if n > 0:
            h = torch.relu(h)  # OPEN: activation between two head convs
        h = F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2)
    return sigmoid(h)


def apply_gate(x, gate, *, residual=False):
    """Equation 4: x <- A . x [+ x]. x (B,C,Y,X), gate (B, 1 or C, Y, X)."""
    B, C = x.shape[:2]
    out = []
    for b in range(B):
        out.append(torch.stack([gate[b, c if gate.shape[1] > 1 else 0] * x[b, c] for c in range(C)]))
    y = torch.stack(out)
    return y + x if residual else y  # OPEN: residual is an inferred option, default off


def multi_scale_gates(image, sizes, body, heads, *, resize="bilinear", pool="max", up="bilinear", training=False):
    """`prepare`: the body runs ONCE; sizes: list of (Y_l, X_l), body: (encoder, decoder, out_weight, out_bias),
    heads: list
    of `convs` -> list of gates."""
    S = global_attention_body(image, *body, pool=pool, up=up, training=training)
    return [scale_gate(S, size, convs, resize=resize) for size, convs in zip(sizes, heads, strict=True)]


def multi_scale_gate(
    image, maps, body, heads, *, residual=False, resize="bilinear", pool="max", up="bilinear", training=False
):
    """`forward`: maps: list of (B,C_l,Y_l,X_l) -> list of the same shapes. Gate l never sees map l, only the image.
    The FeatureMixer form is one map with image = that map."""
    gates = multi_scale_gates(
        image, [m.shape[-2:] for m in maps], body, heads, resize=resize, pool=pool, up=up, training=training
    )
    return [apply_gate(m, g, residual=residual) for m, g in zip(maps, gates)]
