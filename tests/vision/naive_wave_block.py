"""Attentive WaveBlock, CBAM and the non-local block of dot products, in loops.

Its author saw only an account of the equations, neither code nor tests of the library.
"""

import random

import torch
import torch.nn.functional as F


# --- WaveBlock
def wave_height(rows, *, ratio=0.3):
    """h = round(ratio Y), Python's round (half to even)."""
    return round(ratio * rows)


def wave_tops(rows, *, ratio=0.3):
    """All values the first row of the stripe may take: 0 .. Y - h, both ends included, each equally likely."""
    return list(range(0, rows - wave_height(rows, ratio=ratio) + 1))


def wave_block(x, top, *, ratio=0.3, scale=1.5):
    """Eq. 1-2. x (B,C,Y,X), top int: the h rows from `top` stay, all others are multiplied by `scale`; one stripe for
    the batch."""
    B, C, Y, X = x.shape
    h = wave_height(Y, ratio=ratio)
    assert 0 <= top <= Y - h
    y = torch.empty_like(x)
    for b in range(B):
        for c in range(C):
            for i in range(Y):
                for j in range(X):
                    y[b, c, i, j] = x[b, c, i, j] if top <= i < top + h else scale * x[b, c, i, j]
    return y


def wave(x, *, training, top=None, ratio=0.3, scale=1.5):
    """The module: a random stripe in training (or the given one), the identity in eval.

    The draw itself (which generator gives which number) can't be compared; compare with `top` given."""
    if not training:
        return x
    if top is None:
        top = random.choice(wave_tops(x.shape[2], ratio=ratio))
    return wave_block(x, top, ratio=ratio, scale=scale)


# --- CBAM
def channel_gate(x, w1, b1, w2, b2):
    """Eq. 3. x (B,C,Y,X), w1 (C/r,C), b1 (C/r,), w2 (C,C/r), b2 (C,) -> gate (B,C)."""
    B, C, Y, X = x.shape

    def f(s):  # s (C,)
        hidden = [torch.relu(sum(w1[m, c] * s[c] for c in range(C)) + b1[m]) for m in range(w1.shape[0])]
        return [sum(w2[c, m] * hidden[m] for m in range(w1.shape[0])) + b2[c] for c in range(C)]

    rows = []
    for b in range(B):
        mean = torch.stack([sum(x[b, c, y, j] for y in range(Y) for j in range(X)) / (Y * X) for c in range(C)])
        top = torch.stack([x[b, c].reshape(-1).max() for c in range(C)])
        fm, ft = f(mean), f(top)
        rows.append(torch.stack([torch.sigmoid(fm[c] + ft[c]) for c in range(C)]))
    return torch.stack(rows)


def spatial_gate(x, k7, bn_weight, bn_bias, bn_mean=None, bn_var=None, *, training=False, eps=1e-5):
    """Eq. 4. x (B,C,Y,X), k7 (1,2,7,7) no bias, batch norm of one channel -> gate (B,1,Y,X).

    training=True: statistics of the batch (biased variance), else the running ones. Running statistics move with
    momentum 0.01."""
    B, C, Y, X = x.shape
    pair = torch.empty(B, 2, Y, X, dtype=x.dtype)
    for b in range(B):
        for y in range(Y):
            for j in range(X):
                pair[b, 0, y, j] = x[b, :, y, j].max()  # max first
                pair[b, 1, y, j] = sum(x[b, c, y, j] for c in range(C)) / C
    z = F.conv2d(pair, k7, padding=3)
    if training:
        n = z.numel()
        mean = z.sum() / n
        var = ((z - mean) ** 2).sum() / n
    else:
        mean, var = bn_mean[0], bn_var[0]
    return torch.sigmoid((z - mean) / torch.sqrt(var + eps) * bn_weight[0] + bn_bias[0])


def cbam(x, w1, b1, w2, b2, k7, bn_weight, bn_bias, bn_mean=None, bn_var=None, *, training=False):
    """Eq. 5, first half: g . (c . x), WITHOUT the residual. Shapes as above."""
    c = channel_gate(x, w1, b1, w2, b2)
    x1 = x * c[:, :, None, None]
    return spatial_gate(x1, k7, bn_weight, bn_bias, bn_mean, bn_var, training=training) * x1


def cbam_block(x, *params, training=False):
    """Eq. 5, second half: x + CBAM(x)."""
    return x + cbam(x, *params, training=training)


# --- non-local, dot product
def nonlocal_core(theta, phi, v):
    """Eq. 6. theta, phi, v (B,N,K) -> o (B,N,K): o_i = (1/N) sum_j (theta_i . phi_j) v_j. No softmax, no 1/sqrt(D)."""
    B, N, K = theta.shape
    out = []
    for b in range(B):
        rows = []
        for i in range(N):
            o = torch.zeros(K, dtype=theta.dtype)
            for j in range(N):
                s = sum(theta[b, i, k] * phi[b, j, k] for k in range(K))
                o = o + s / N * v[b, j]
            rows.append(o)
        out.append(torch.stack(rows))
    return torch.stack(out)


def nonlocal_block(
    x,
    w_theta,
    b_theta,
    w_phi,
    b_phi,
    w_v,
    b_v,
    w_out,
    b_out,
    bn_weight,
    bn_bias,
    bn_mean=None,
    bn_var=None,
    *,
    training=False,
    eps=1e-5,
):
    """Eq. 6-7. x (B,C,Y,X); w_theta, w_phi, w_v (K,C) with K = C/2 and biases (K,); w_out (C,K), b_out (C,); batch
    norm (C,).

    y = x + BN(W o + b). Weight and bias of the batch norm start at 0: the block starts as the identity."""
    B, C, Y, X = x.shape
    tokens = x.reshape(B, C, Y * X).transpose(1, 2)
    o = nonlocal_core(F.linear(tokens, w_theta, b_theta), F.linear(tokens, w_phi, b_phi), F.linear(tokens, w_v, b_v))
    z = F.linear(o, w_out, b_out)  # (B,N,C)
    normed = torch.empty_like(z)
    for c in range(C):
        if training:
            n = B * Y * X
            mean = z[:, :, c].sum() / n
            var = ((z[:, :, c] - mean) ** 2).sum() / n
        else:
            mean, var = bn_mean[c], bn_var[c]
        normed[:, :, c] = (z[:, :, c] - mean) / torch.sqrt(var + eps) * bn_weight[c] + bn_bias[c]
    return x + normed.transpose(1, 2).reshape(B, C, Y, X)


# --- order of attention and wave
def attentive_wave_block(x, attention, *, order, training, top=None, ratio=0.3, scale=1.5):
    """`attention`: a function map -> map that has its residual inside (cbam_block or nonlocal_block with its
    parameters bound).

    order "pre": attention, then wave; "post": wave, then attention.
    OPEN: the released models pair pre with CBAM and post with the non-local block; the other two pairings are allowed
    by the account's
    signature and follow the same rule, but no code has them."""
    if order == "pre":
        return wave(attention(x), training=training, top=top, ratio=ratio, scale=scale)
    assert order == "post"
    return attention(wave(x, training=training, top=top, ratio=ratio, scale=scale))
