"""Embedding-free attention with inference spatial reduction, in loops.

Its author saw only an account of the equations, neither code nor tests of the library.
"""

import math

import torch
import torch.nn.functional as F


def pool_mean(x, Y, X, r):
    """Eq. 2. x (B,N,M), N = Y X row-major -> (B, floor(Y/r) floor(X/r), M); rows and columns that are left over are
    dropped."""
    _B, _N, _M = x.shape
    h, w = Y // r, X // r
    if h == 0 or w == 0:
        raise ValueError("map smaller than the pool")
    cells = []
    for y in range(h):
        for i in range(w):
            cells.append(sum(x[:, (y * r + a) * X + i * r + e] for a in range(r) for e in range(r)) / (r * r))
    return torch.stack(cells, 1)


def layer_norm(x, weight, bias, eps):
    M = x.shape[-1]
    mean = x.sum(-1, keepdim=True) / M
    var = ((x - mean) ** 2).sum(-1, keepdim=True) / M
    return (x - mean) / torch.sqrt(var + eps) * weight + bias


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def embedding_free_attention(x, w_out, b_out, num_heads, *, Y, X, pool=1, reduction=1, w_sr=None, b_sr=None, norm=None):
    """Eq. 1-4, 6. x (B,N,M) already normed; w_out (M,M), b_out (M,); the pool is pool * reduction (reduction = ISR,
    test time).

    w_sr (M,M), b_sr (M,): the 1x1 convolution shared by keys and values (pooled_conv=True); None: k = v = the pooled
    map itself
    (our option). norm = (weight, bias): decoder form, k = v = GELU(LN(Wsr p + bsr)), eps 1e-5 (pooled_norm=True).
    OPEN: pooled_norm with pooled_conv=False isn't in any code; here LN and GELU then act on the pooled map."""
    B, N, M = x.shape
    assert N == Y * X
    D = M // num_heads
    k = pool_mean(x, Y, X, pool * reduction)
    if w_sr is not None:
        k = F.linear(k, w_sr, b_sr)
    if norm is not None:
        k = gelu(layer_norm(k, norm[0], norm[1], 1e-5))
    L = k.shape[1]
    out = []
    for b in range(B):
        rows = []
        for i in range(N):
            heads = []
            for h in range(num_heads):
                c = slice(h * D, (h + 1) * D)
                s = torch.stack([(x[b, i, c] * k[b, j, c]).sum() / math.sqrt(D) for j in range(L)])
                a = torch.softmax(s, 0)
                heads.append(sum(a[j] * k[b, j, c] for j in range(L)))
            rows.append(torch.cat(heads))
        out.append(torch.stack(rows))
    return F.linear(torch.stack(out), w_out, b_out)


def on_map(x, *args, **kw):
    """The same on a map (B,M,Y,X)."""
    B, M, Y, X = x.shape
    o = embedding_free_attention(x.reshape(B, M, Y * X).transpose(1, 2), *args, Y=Y, X=X, **kw)
    return o.transpose(1, 2).reshape(B, M, Y, X)


def mlp(x, w1, b1, dw, dwb, w2, b2, *, Y, X, encoder=True):
    """Linear -> (encoder only: ReLU) -> depthwise 3x3 with bias -> GELU -> Linear. w1 (K,M), dw (K,1,3,3), w2 (M,K)."""
    h = F.linear(x, w1, b1)
    if encoder:
        h = torch.relu(h)
    B, N, K = h.shape
    h = F.conv2d(h.transpose(1, 2).reshape(B, K, Y, X), dw, dwb, padding=1, groups=K).reshape(B, K, N).transpose(1, 2)
    return F.linear(gelu(h), w2, b2)


def block(x, norm1, attention, norm2, mlp_weights, num_heads, *, Y, X, pool=1, reduction=1, encoder=True, norm=None):
    """Eq. 5, no stochastic depth. norm1, norm2 = (weight, bias); attention = (w_out, b_out, w_sr, b_sr). LN eps 1e-6
    in the encoder,
    1e-5 in the decoder (there `norm` = the attention's own LN)."""
    eps = 1e-6 if encoder else 1e-5
    w_out, b_out, w_sr, b_sr = attention
    x = x + embedding_free_attention(
        layer_norm(x, *norm1, eps),
        w_out,
        b_out,
        num_heads,
        Y=Y,
        X=X,
        pool=pool,
        reduction=reduction,
        w_sr=w_sr,
        b_sr=b_sr,
        norm=norm,
    )
    return x + mlp(layer_norm(x, *norm2, eps), *mlp_weights, Y=Y, X=X, encoder=encoder)


def patch_embedding(image, w, b, norm, *, stride):
    """Overlapping patches: conv k (7 or 3), stride (4 or 2), padding k//2, then LN (eps 1e-5 also in the encoder: its
    embedding takes the default) -> (tokens (B,N,M), Y, X)."""
    z = F.conv2d(image, w, b, stride=stride, padding=w.shape[-1] // 2)
    B, M, Y, X = z.shape
    return layer_norm(z.reshape(B, M, Y * X).transpose(1, 2), norm[0], norm[1], 1e-5), Y, X


def stage(image, embedding, blocks, norm, *, stride):
    """A stage of the encoder: embedding = (w, b, norm) of patch_embedding, blocks = functions (x, Y, X) -> x, then LN
    eps 1e-6 -> map."""
    w, b, n = embedding
    x, Y, X = patch_embedding(image, w, b, n, stride=stride)
    for f in blocks:
        x = f(x, Y, X)
    x = layer_norm(x, norm[0], norm[1], 1e-6)
    return x.transpose(1, 2).reshape(x.shape[0], -1, Y, X)
