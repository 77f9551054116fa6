"""A120 Bottleneck Transformer (BoTNet) 2-D relative self-attention (Srinivas et al.; CVPR 2021), naive oracle.

Loops over samples, heads and pixels. Weights of 1x1 convolutions may be (O, I) or (O, I, 1, 1).
"""

import torch
import torch.nn.functional as F


def _matrix(weight):
    return weight.reshape(weight.shape[0], -1)


def split_qkv(x, qkv_weight, qkv_bias, H, D):
    """[q | k | v] = conv1x1(x), channels H D, H D, H V in this order, each head-major. x (B,M,Y,X) ->
    q, k (B,H,Y,X,D), v (B,H,Y,X,V)."""
    W = _matrix(qkv_weight)
    B, _M, Y, X = x.shape
    V = W.shape[0] // H - 2 * D
    z = torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [W @ x[b, :, y, u] if qkv_bias is None else W @ x[b, :, y, u] + qkv_bias for u in range(X)]
                    )
                    for y in range(Y)
                ]
            )
            for b in range(B)
        ]
    )

    def cut(lo, n):
        return z[..., lo : lo + H * n].reshape(B, Y, X, H, n).permute(0, 3, 1, 2, 4)

    return cut(0, D), cut(H * D, D), cut(2 * H * D, V)


def position_logit(q, y, x, u, w, *, relative=None, absolute=None):
    """Position term of query vector q (D,) at (y, x) for key (u, w), unscaled.
    relative = (R_y (2Y-1, D), R_x (2X-1, D)): <q, R_y[u - y + Y - 1]> + <q, R_x[w - x + X - 1]>, tables shared by
    heads.
    absolute = (E_y (Y, D), E_x (X, D)): <q, E_y[u] + E_x[w]>."""
    if relative is not None:
        R_y, R_x = relative
        Y, X = (R_y.shape[0] + 1) // 2, (R_x.shape[0] + 1) // 2
        return (q * R_y[u - y + Y - 1]).sum() + (q * R_x[w - x + X - 1]).sum()
    E_y, E_x = absolute
    return (q * (E_y[u] + E_x[w])).sum()


def botnet_attention(
    x,
    qkv_weight,
    R_y,
    R_x,
    num_heads,
    head_dim,
    *,
    qkv_bias=None,
    scale_position=True,
    pool=False,
    absolute=False,
    return_weights=False,
):
    """x (B,M,Y,X); qkv_weight (2 H D + H V, M); R_y (2Y-1, D), R_x (2X-1, D) (absolute: E_y (Y,D), E_x (X,D)) ->
    (B, H V, Y, X), or half the size with pool.

    z = s <q,k> + s' (position term), s = D^(-1/2); scale_position True: s' = s (main form), False: s' = 1 (timm's
    default). Softmax over all Y X keys; no output projection; pool: AvgPool2d(2,2) after full-resolution attention."""
    # OPEN: s' differs between libraries (the paper's formula qk^T + qr^T was read in a mirror only): an argument.
    B, _M, Y, X = x.shape
    H, D = num_heads, head_dim
    s = D**-0.5
    s_pos = s if scale_position else 1.0
    q, k, v = split_qkv(x, qkv_weight, qkv_bias, H, D)
    tables = {"absolute" if absolute else "relative": (R_y, R_x)}
    pixels = [(y, c) for y in range(Y) for c in range(X)]
    outs, weights = [], []
    for b in range(B):
        heads, head_weights = [], []
        for h in range(H):
            cols, rows = [], []
            for y, c in pixels:
                query = q[b, h, y, c]
                z = torch.stack(
                    [
                        s * (query * k[b, h, u, w]).sum() + s_pos * position_logit(query, y, c, u, w, **tables)
                        for u, w in pixels
                    ]
                )
                e = torch.exp(z - z.max().detach())
                a = e / e.sum()
                rows.append(a)
                cols.append(sum(a[n] * v[b, h, u, w] for n, (u, w) in enumerate(pixels)))
            heads.append(torch.stack(cols, dim=1).reshape(-1, Y, X))
            head_weights.append(torch.stack(rows))
        outs.append(torch.cat(heads))  # head-major channels
        weights.append(torch.stack(head_weights))
    out = torch.stack(outs)
    if pool:
        out = average_pool_2x2(out)
    return (out, torch.stack(weights)) if return_weights else out


def average_pool_2x2(x):
    """AvgPool2d(2, 2); an odd last row or column is dropped."""
    _B, _C, Y, X = x.shape
    return torch.stack(
        [
            torch.stack(
                [sum(x[:, :, 2 * i + a, 2 * j + b] for a in (0, 1) for b in (0, 1)) / 4 for j in range(X // 2)], -1
            )
            for i in range(Y // 2)
        ],
        -2,
    )


def batch_norm(x, bn, *, training=False, eps=1e-5):
    """bn = (weight, bias, running_mean, running_var)."""
    weight, bias, mean, var = bn
    out = []
    for c in range(x.shape[1]):
        m, s = (x[:, c].mean(), ((x[:, c] - x[:, c].mean()) ** 2).mean()) if training else (mean[c], var[c])
        out.append(weight[c] * (x[:, c] - m) / torch.sqrt(s + eps) + bias[c])
    return torch.stack(out, dim=1)


def bot_block(x, in_weight, in_bn, attention, mid_bn, out_weight, out_bn, *, pool=False, shortcut=None, training=False):
    """1x1 M -> P, BN, ReLU, MHSA [, AvgPool], BN, ReLU, 1x1 -> 4P, BN (weight starts 0), add shortcut, ReLU.
    attention: (qkv_weight, R_y, R_x, num_heads, head_dim, options dict); shortcut None (identity) or (weight, bn): 1x1
    conv (stride 2 when pool), BN."""
    # OPEN: lucidrains uses a 3x3 stride 2 shortcut with an activation when downsampling; the account's line gives 1x1.
    h = torch.relu(batch_norm(F.conv2d(x, _matrix(in_weight)[:, :, None, None]), in_bn, training=training))
    *args, options = attention
    h = botnet_attention(h, *args, pool=pool, **options)
    h = torch.relu(batch_norm(h, mid_bn, training=training))
    h = batch_norm(F.conv2d(h, _matrix(out_weight)[:, :, None, None]), out_bn, training=training)
    r = x
    if shortcut is not None:
        weight, bn = shortcut
        weight = weight if weight.dim() == 4 else weight[:, :, None, None]
        r = batch_norm(
            F.conv2d(x, weight, stride=2 if pool else 1, padding=weight.shape[-1] // 2), bn, training=training
        )
    return torch.relu(h + r)
