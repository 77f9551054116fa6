"""Permuted self-attention and SRFormer: loops over samples, windows, heads and pixels.

Their author saw only the paper's account, neither code nor test of the library.
"""

import math

import torch
import torch.nn.functional as F


def gelu(z):
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def layer_norm(v, weight, bias, eps=1e-5):
    """v (C,)."""
    m = v.mean()
    return weight * (v - m) / torch.sqrt(((v - m) ** 2).mean() + eps) + bias


def layer_norm_map(x, weight, bias, eps=1e-5):
    """Over channels at each pixel of (B,C,Y,X)."""
    B, _, Y, X = x.shape
    return torch.stack(
        [
            torch.stack(
                [torch.stack([layer_norm(x[b, :, y, c], weight, bias, eps) for c in range(X)], -1) for y in range(Y)],
                -2,
            )
            for b in range(B)
        ]
    )


def permute_cell(k0, reduction=2):
    """Equation 3: k0 (w, w, C/r^2) -> (w/r, w/r, C): k[i, j, (r dy + dx) C/r^2 + c] = k0[r i + dy, r j + dx, c]."""
    r, w = reduction, k0.shape[0]
    return torch.stack(
        [
            torch.stack(
                [
                    torch.cat([k0[r * i + dy, r * j + dx] for dy in range(r) for dx in range(r)])
                    for j in range(k0.shape[1] // r)
                ]
            )
            for i in range(w // r)
        ]
    )


def coarse_bias(table, window, num_heads, reduction=2):
    """R_h[(y,x),(i,j)] = table[(y//r - i + n - 1) (2n - 1) + (x//r - j + n - 1), h], n = w/r. table ((2n-1)^2, H) ->
    (H, w^2, n^2). r = 2: side w - 1."""
    n, r = window // reduction, reduction
    side = 2 * n - 1
    heads = []
    for h in range(num_heads):
        rows = []
        for t in range(window * window):
            y, x = t // window, t % window
            rows.append(
                torch.stack(
                    [table[(y // r - i + n - 1) * side + (x // r - j + n - 1), h] for i in range(n) for j in range(n)]
                )
            )
        heads.append(torch.stack(rows))
    return torch.stack(heads)


def permuted_window_attention(q, k0, v0, num_heads, *, bias=None, mask=None, reduction=2, return_weights=False):
    """Equations 3 to 5 of one window. q (w,w,C); k0, v0 (w,w,C/r^2), before the permutation; bias (H, w^2, (w/r)^2);
    mask (w^2, (w/r)^2), additive -> (w,w,C), heads concatenated, before Wo."""
    # OPEN: the account's Build signature is (q, k, v, *, window, bias, mask) without shapes; here one window, not yet
    # permuted keys and values, C/r^2 channels each. permuted_map_attention below takes whole maps.
    w, C = q.shape[0], q.shape[2]
    D = C // num_heads
    k = permute_cell(k0, reduction).reshape(-1, C)  # S = (w/r)^2 keys, row-major
    v = permute_cell(v0, reduction).reshape(-1, C)
    q = q.reshape(-1, C)  # T = w^2 queries, row-major
    S = k.shape[0]
    out, weights = [], []
    for t in range(q.shape[0]):
        heads, row = [], []
        for h in range(num_heads):
            c = slice(h * D, (h + 1) * D)  # heads AFTER the permutation, consecutive channels
            score = torch.stack([D**-0.5 * (q[t, c] * k[s, c]).sum() for s in range(S)])
            if bias is not None:
                score = score + bias[h, t]
            if mask is not None:
                score = score + mask[t]
            e = torch.exp(score - score.max().detach())
            a = e / e.sum()
            row.append(a)
            heads.append(sum(a[s] * v[s, c] for s in range(S)))
        out.append(torch.cat(heads))
        weights.append(torch.stack(row))
    out = torch.stack(out).reshape(w, w, C)
    return (out, torch.stack(weights, dim=1)) if return_weights else out  # A (H, T, S)


def band(p, n, w, s):
    """0 for p < n - w, 1 for p < n - s, else 2."""
    return 0 if p < n - w else 1 if p < n - s else 2


def shift_mask(Y, X, window, shift, *, reduction=2, value=-100.0):
    """Mask of every window of the ROLLED map: 0 where the region of the query equals the region of the key, else value.
    Queries: bands with (n, w, s) on Y x X; keys: bands with (n/r, w/r, ceil(s/r)) on Y/r x X/r ->
    dict (window row, window column) -> (w^2, (w/r)^2)."""
    # ceil: Python's -shift // 2 in the released code; for odd s a cell on the border belongs to the last band.
    # OPEN: value -100 in the released code; -inf is the exact mask (difference about exp(-100)).
    # The repository's FIRST commit (6401aa8) used s instead of s/2 for the keys, a fault mended in bc85758.
    r = reduction
    masks = {}
    for a in range(Y // window):
        for b in range(X // window):
            rows = []
            for y in range(window):
                for x in range(window):
                    mine = band(a * window + y, Y, window, shift), band(b * window + x, X, window, shift)
                    row = []
                    for i in range(window // r):
                        for j in range(window // r):
                            theirs = (
                                band(a * window // r + i, Y // r, window // r, -(-shift // r)),
                                band(b * window // r + j, X // r, window // r, -(-shift // r)),
                            )
                            row.append(0.0 if mine == theirs else value)
                    rows.append(row)
            masks[a, b] = torch.tensor(rows, dtype=torch.float64)
    return masks


def permuted_map_attention(q, k0, v0, num_heads, *, window, shift=0, table=None, reduction=2, mask_value=-100.0):
    """The core on maps: q (B,C,Y,X), k0, v0 (B,C/r^2,Y,X), Y, X multiples of window -> (B,C,Y,X) before Wo.
    shift: roll by (-s,-s), windows with the region mask, roll back. table ((2w/r-1)^2, H) or None."""
    B, _, Y, X = q.shape
    assert Y % window == 0
    assert X % window == 0

    def roll(z, s):
        rows = [torch.stack([z[:, :, (y + s) % Y, (x + s) % X] for x in range(X)], -1) for y in range(Y)]
        return torch.stack(rows, -2)

    def cut(z, b, i, j):
        return z[b, :, i * window : (i + 1) * window, j * window : (j + 1) * window].permute(1, 2, 0)

    if shift:
        q, k0, v0 = roll(q, shift), roll(k0, shift), roll(v0, shift)
    bias = None if table is None else coarse_bias(table, window, num_heads, reduction)
    masks = shift_mask(Y, X, window, shift, reduction=reduction, value=mask_value) if shift else None
    out = []
    for b in range(B):
        strips = []
        for i in range(Y // window):
            row = []
            for j in range(X // window):
                o = permuted_window_attention(
                    cut(q, b, i, j),
                    cut(k0, b, i, j),
                    cut(v0, b, i, j),
                    num_heads,
                    bias=bias,
                    mask=None if masks is None else masks[i, j],
                    reduction=reduction,
                )
                row.append(o.permute(2, 0, 1))
            strips.append(torch.cat(row, dim=2))
        out.append(torch.cat(strips, dim=1))
    out = torch.stack(out)
    return roll(out, -shift) if shift else out


def linear_map(x, weight, bias):
    """1x1: weight (O,I), bias (O,) or None, x (B,I,Y,X) -> (B,O,Y,X)."""
    W = weight.reshape(weight.shape[0], -1)
    B, _, Y, X = x.shape
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack([W @ x[b, :, y, c] if bias is None else W @ x[b, :, y, c] + bias for c in range(X)], -1)
                    for y in range(Y)
                ],
                -2,
            )
            for b in range(B)
        ]
    )


def permuted_self_attention(
    x,
    q_weight,
    q_bias,
    kv_weight,
    kv_bias,
    o_weight,
    o_bias,
    table,
    num_heads,
    *,
    window,
    shift=0,
    reduction=2,
    mask_value=-100.0,
):
    """Equations 1 to 6, x (B,C,Y,X) already normed -> (B,C,Y,X). q_weight, o_weight (C,C), kv_weight (2C/r^2, C): first
    half k0, second half v0; table ((2w/r-1)^2, H) or None. Dropout left out."""
    # OPEN: maps that are no multiple of the window (the network pads the IMAGE by reflection, see srformer) are refused
    # here. In the released code a map whose smaller side is <= w sets w to that side and s to 0 (effective_window).
    n = kv_weight.shape[0] // 2
    q = linear_map(x, q_weight, q_bias)
    kv = linear_map(x, kv_weight, kv_bias)
    o = permuted_map_attention(
        q,
        kv[:, :n],
        kv[:, n:],
        num_heads,
        window=window,
        shift=shift,
        table=table,
        reduction=reduction,
        mask_value=mask_value,
    )
    return linear_map(o, o_weight, o_bias)


def effective_window(Y, X, window, shift):
    """Released code, decided at construction from the training size: min(Y, X) <= w -> (min(Y, X), 0)."""
    return (min(Y, X), 0) if min(Y, X) <= window else (window, shift)


def strided_head_attention(q, k0, v0, num_heads, *, table=None, reduction=2):
    """What one window computes when H is a multiple of r^2 (the account's section 4): head h has keys and values at
    every r-th pixel only, phase (dy, dx) = number h // (H / r^2), channels (h mod H/r^2) D ... of k0, v0."""
    w, C = q.shape[0], q.shape[2]
    r, D = reduction, C // num_heads
    group = num_heads // (r * r)
    bias = None if table is None else coarse_bias(table, w, num_heads, r)
    out = []
    for y in range(w):
        for x in range(w):
            heads = []
            for h in range(num_heads):
                dy, dx = (h // group) // r, (h // group) % r
                c = slice((h % group) * D, (h % group + 1) * D)
                keys = [(r * i + dy, r * j + dx) for i in range(w // r) for j in range(w // r)]
                score = torch.stack([D**-0.5 * (q[y, x, h * D : (h + 1) * D] * k0[a, b, c]).sum() for a, b in keys])
                if bias is not None:
                    score = score + bias[h, y * w + x]
                p = torch.softmax(score, dim=0)
                heads.append(sum(p[n] * v0[a, b, c] for n, (a, b) in enumerate(keys)))
            out.append(torch.cat(heads))
    return torch.stack(out).reshape(w, w, C)


def conv_ffn(x, w1, b1, depth_weight, depth_bias, w2, b2):
    """FFN(z) = W2 (h + gelu(DW h + b)) + b2, h = gelu(W1 z + b1): the depthwise branch is ADDED. x (B,C,Y,X), w1 (E,C),
    depth_weight (E,1,5,5), depth_bias (E,), w2 (C,E). Dropout before and after W2 left out."""
    h = gelu(linear_map(x, w1, b1))
    d = F.conv2d(h, depth_weight, depth_bias, padding=depth_weight.shape[-1] // 2, groups=h.shape[1])
    return linear_map(h + gelu(d), w2, b2)


def srformer_block(x, ln1, attention, ln2, ffn, num_heads, *, window, shift=0, **options):
    """x <- x + PSA(LN1 x); x <- x + FFN(LN2 x). ln1, ln2 (weight, bias), eps 1e-5; attention: the seven tensors of
    permuted_self_attention after x; ffn: the six of conv_ffn. No drop path."""
    x = x + permuted_self_attention(
        layer_norm_map(x, *ln1), *attention, num_heads, window=window, shift=shift, **options
    )
    return x + conv_ffn(layer_norm_map(x, *ln2), *ffn)


def srformer_group(x, blocks, conv_weight, conv_bias, num_heads, *, window, **options):
    """n blocks (odd-numbered ones, counted from 0, shifted by w/2), 3x3 conv, skip. blocks: list of (ln1, attention,
    ln2, ffn)."""
    h = x
    for n, (ln1, attention, ln2, ffn) in enumerate(blocks):
        h = srformer_block(
            h, ln1, attention, ln2, ffn, num_heads, window=window, shift=0 if n % 2 == 0 else window // 2, **options
        )
    return x + F.conv2d(h, conv_weight, conv_bias, padding=1)


def pixel_shuffle(x, s):
    """(B, C s^2, Y, X) -> (B, C, sY, sX): out[c, s y + i, s x + j] = x[c s^2 + s i + j, y, x]."""
    Y, X = x.shape[2:]
    return torch.stack(
        [
            torch.stack([x[:, (a % s) * s + b % s :: s * s, a // s, b // s] for b in range(s * X)], -1)
            for a in range(s * Y)
        ],
        -2,
    )


def srformer(
    image,
    scale,
    first,
    groups,
    norm,
    after,
    up,
    num_heads,
    *,
    window,
    embed_norm=None,
    last=None,
    mean=(0.4488, 0.4371, 0.4040),
    image_range=1.0,
    **options,
):
    """image (B,3,Y,X) -> (B,3,sY,sX). (image - mean) * range; reflect padding right and bottom to a multiple of window;
    conv `first`; [LN embed_norm]; groups; LN `norm`; conv `after`; + the result of `first`; upsampler; / range + mean;
    crop. first, after: (weight, bias) 3x3. groups: list of (blocks, conv_weight, conv_bias).
    last None (light): up = (weight (3 s^2, C, 3, 3), bias), pixel shuffle by s. Otherwise (classical): up = list: first
    (weight, bias) conv and LeakyReLU 0.01, then one conv and pixel shuffle for each factor (2, 2 for 4; 3; 2); last
    (weight, bias)."""
    # The released network has patch_norm=True: a LayerNorm BEFORE the groups, not in the account's list; embed_norm is
    # (weight, bias) or None. The skip is the conv's result before that norm.
    # In the released code the padding comes before the subtraction of the mean; both orders give the same numbers.
    Y, X = image.shape[2:]
    x = F.pad(image, (0, -X % window, 0, -Y % window), mode="reflect")
    m = torch.tensor(mean, dtype=x.dtype)[None, :, None, None]
    x = (x - m) * image_range
    f = F.conv2d(x, *first, padding=1)
    h = f if embed_norm is None else layer_norm_map(f, *embed_norm)
    for blocks, weight, bias in groups:
        h = srformer_group(h, blocks, weight, bias, num_heads, window=window, **options)
    f = F.conv2d(layer_norm_map(h, *norm), *after, padding=1) + f
    if last is None:
        y = pixel_shuffle(F.conv2d(f, *up, padding=1), scale)
    else:
        f = F.leaky_relu(F.conv2d(f, *up[0], padding=1), 0.01)
        for s, conv in zip((2,) * int(math.log2(scale)) if scale & (scale - 1) == 0 else (scale,), up[1:], strict=True):
            f = pixel_shuffle(F.conv2d(f, *conv, padding=1), s)
        y = F.conv2d(f, *last, padding=1)
    y = y / image_range + m
    return y[:, :, : Y * scale, : X * scale]
