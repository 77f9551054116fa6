"""A002 Partial attention convolution: PAT_ch, PAT_sp, PAT_sf and the block (PATNet / PartialNet), naive oracle.

Read against the official models/partialnet.py and irpe.py @ 679cfc0d; equations 1 to 10 of the account agree.
Loops over samples, channels, heads and pixels; plain convolutions by torch.nn.functional.
A batch norm is a tuple (weight, bias, running_mean, running_var), each (C,).
"""

import math

import torch
import torch.nn.functional as F


def batch_norm(x, bn, *, training=False, eps=1e-5):
    """x (B, C, ...). Training: batch mean and BIASED variance of each channel; eval: running ones."""
    weight, bias, mean, var = bn
    out = []
    for c in range(x.shape[1]):
        m, s = (x[:, c].mean(), ((x[:, c] - x[:, c].mean()) ** 2).mean()) if training else (mean[c], var[c])
        out.append(weight[c] * (x[:, c] - m) / torch.sqrt(s + eps) + bias[c])
    return torch.stack(out, dim=1)


def hard_sigmoid(z):
    # torch's own nn.Hardsigmoid has the float32 number 1/6 in its BACKWARD (relative error 3e-8, float64 too): golden
    # gradients that pass the gate differ from this exact form by that much; with F.hardsigmoid here they agree to
    # 1e-14.
    return torch.clamp(z + 3, 0, 6) / 6


def pointwise(weight, x):
    """1x1 convolution without bias: weight (O, I[,1,1]), x (B, I, Y, X) -> (B, O, Y, X)."""
    W = weight.reshape(weight.shape[0], -1)
    B, _C, Y, X = x.shape
    return torch.stack(
        [torch.stack([torch.stack([W @ x[b, :, y, z] for z in range(X)], -1) for y in range(Y)], -2) for b in range(B)]
    )


def gaussian_channel_gate(x, pair_weight, bn, *, training=False):
    """Equations 2 to 4. x (B, C', Y, X), pair_weight (C', C', 1, 2): [..., 0] on the mean, [..., 1] on the standard
    deviation -> g (B, C')."""
    W0, W1 = pair_weight[:, :, 0, 0], pair_weight[:, :, 0, 1]
    B, C, Y, X = x.shape
    N = Y * X
    z = []
    for b in range(B):
        m = torch.stack([x[b, k].sum() / N for k in range(C)])
        # UNBIASED standard deviation: N = 1 gives NaN. torch's own std is used so that a constant channel has
        # gradient 0.
        s = torch.stack([x[b, k].std(unbiased=True) for k in range(C)])
        z.append(W0 @ m + W1 @ s)
    return hard_sigmoid(batch_norm(torch.stack(z), bn, training=training))


def partial_channel_attention(x, conv_weight, pair_weight, gate_bn, norm_bn, *, training=False):
    """PAT_ch, equations 1 to 5. x (B,C,Y,X); conv_weight (c,c,3,3), c = C // divide; pair_weight (C-c, C-c, 1, 2);
    gate_bn, norm_bn over C - c channels -> (B,C,Y,X)."""
    c = conv_weight.shape[0]
    x1, x2 = x[:, :c], x[:, c:]  # the FIRST c channels are convolved
    x1 = F.conv2d(x1, conv_weight, padding=1)
    g = gaussian_channel_gate(x2, pair_weight, gate_bn, training=training)
    gated = torch.stack([torch.stack([g[b, k] * x2[b, k] for k in range(x2.shape[1])]) for b in range(x.shape[0])])
    return torch.cat([x1, batch_norm(gated, norm_bn, training=training)], dim=1)


def partial_spatial_attention(x, attn_weight, conv_weight, attn_bn, conv_bn, *, training=False):
    """PAT_sp, equations 6, 7. x (B,C,Y,X); attn_weight (1, C-d, 1, 1); conv_weight (d, d, 1, 1), d = int(partial * C);
    attn_bn over C-d channels (BN_a), conv_bn over d (BN_b) -> (B,C,Y,X). Attention FIRST part, conv LAST part."""
    n = attn_weight.shape[1]
    u, v = x[:, :n], x[:, n:]
    a = hard_sigmoid(pointwise(attn_weight, u))  # (B, 1, Y, X)
    return torch.cat(
        [
            batch_norm(a * u, attn_bn, training=training),
            pointwise(conv_weight, batch_norm(v, conv_bn, training=training)),
        ],
        dim=1,
    )


def distance_bucket(d, alpha=20, beta=40, gamma=160):
    """b(d), d a rounded distance >= 0: d up to alpha, then logarithmic, at most beta. Rounding half to even."""
    if d <= alpha:
        return int(d)
    return int(min(beta, round(alpha + math.log(d / alpha) / math.log(gamma / alpha) * (beta - alpha))))


def euclidean_bias(table, Y, X, *, alpha=20, beta=40, gamma=160):
    """R_h[i, j] = table_h[beta + b(dist)], dist = round(sqrt(dy^2 + dx^2)). table (H, 2 beta + 1) -> (H, YX, YX)."""
    heads = []
    for h in range(table.shape[0]):
        rows = []
        for i in range(Y * X):
            row = []
            for j in range(Y * X):
                dy, dx = i // X - j // X, i % X - j % X
                row.append(table[h, beta + distance_bucket(round(math.sqrt(dy * dy + dx * dx)), alpha, beta, gamma)])
            rows.append(torch.stack(row))
        heads.append(torch.stack(rows))
    return torch.stack(heads)


def partial_self_attention(
    x,
    conv_weight,
    ln_weight,
    ln_bias,
    qkv_weight,
    o_weight,
    o_bias,
    table,
    num_heads,
    *,
    alpha=20,
    beta=40,
    gamma=160,
    ln_eps=1e-6,
):
    """PAT_sf, equations 8 to 10. x (B,C,Y,X); conv_weight (c,c,3,3); M = C - c; ln (M,); qkv_weight (3M, M) no bias,
    rows [q | k | v], each head-major; o_weight (M,M), o_bias (M,); table (H, 2 beta + 1) -> (B,C,Y,X).
    Dropout 0.1 on A and after Wo in training is left out."""
    # OPEN: the account's Build names one argument max_distance=40 (= beta); alpha 20 and gamma 160 are then 1/2 and 4
    # times it in the released code (ratio 20: alpha = ratio, beta = 2 ratio, gamma = 8 ratio).
    c = conv_weight.shape[0]
    x1 = F.conv2d(x[:, :c], conv_weight, padding=1)
    x2 = x[:, c:]
    B, M, Y, X = x2.shape
    N, D = Y * X, M // num_heads
    R = euclidean_bias(table, Y, X, alpha=alpha, beta=beta, gamma=gamma)
    outs = []
    for b in range(B):
        tokens = []
        for n in range(N):
            p = x2[b, :, n // X, n % X]
            m = p.mean()
            tokens.append(ln_weight * (p - m) / torch.sqrt(((p - m) ** 2).mean() + ln_eps) + ln_bias)
        q, k, v = ([qkv_weight[r * M : (r + 1) * M] @ t for t in tokens] for r in range(3))
        q, k, v = list(q), list(k), list(v)
        result = []
        for i in range(N):
            heads = []
            for h in range(num_heads):
                s = slice(h * D, (h + 1) * D)
                score = torch.stack([D**-0.5 * (q[i][s] * k[j][s]).sum() + R[h, i, j] for j in range(N)])
                e = torch.exp(score - score.max().detach())
                a = e / e.sum()
                heads.append(sum(a[j] * v[j][s] for j in range(N)))
            result.append(o_weight @ torch.cat(heads) + o_bias)
        outs.append(torch.stack(result, dim=-1).reshape(M, Y, X))
    return torch.cat([x1, torch.stack(outs)], dim=1)


def mlp(x, w1, bn, w2, spatial=None, *, training=False):
    """1x1 (C -> 2C) no bias, BN, ReLU, 1x1 (2C -> C) no bias, then PAT_sp when spatial = (attn_weight, conv_weight,
    attn_bn, conv_bn) is given."""
    h = torch.relu(batch_norm(pointwise(w1, x), bn, training=training))
    h = pointwise(w2, h)
    return h if spatial is None else partial_spatial_attention(h, *spatial, training=training)


def partial_attention_block(x, kind, mixing, mlp_weights, *, layer_scale=None, training=False):
    """kind "channel": y = x + MLP(PAT_ch(x));  kind "self": h = x + PAT_sf(x), y = h + MLP(h).
    mixing: the arguments of `partial_channel_attention` after x, or of `partial_self_attention` after x (num_heads
    last); mlp_weights: those of `mlp` after x; layer_scale (C,) multiplies the MLP's result. No drop path."""
    scale = (lambda z: z) if layer_scale is None else (lambda z: layer_scale[None, :, None, None] * z)
    if kind == "channel":
        return x + scale(mlp(partial_channel_attention(x, *mixing, training=training), *mlp_weights, training=training))
    h = x + partial_self_attention(x, *mixing)
    return h + scale(mlp(h, *mlp_weights, training=training))
