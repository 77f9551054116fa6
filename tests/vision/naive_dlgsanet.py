"""MHDLSA, SparseGSA and DLGSANet's block: loops over channels and pixels.

Their author saw only the paper's account, neither code nor test of the library.
"""

import math

import torch
import torch.nn.functional as F


def conv1x1(x, w, b=None):
    return F.conv2d(x, w if w.dim() == 4 else w[:, :, None, None], b)


# ---------------------------------------------------------------- MHDLSA
def dynamic_kernels(u, w1, b1, dw, dwb, w2, b2):
    """Eq. 2. u (B,C,Y,X); w1 (C/4,C), dw (C/4,1,K,K), w2 (K K G, C/4), all with bias (b2 may be None) -> z (B, K
    K G, Y, X).
    No activation, norm or softmax anywhere."""
    h = conv1x1(u, w1, b1)
    h = F.conv2d(h, dw, dwb, padding=dw.shape[-1] // 2, groups=dw.shape[0])
    return conv1x1(h, w2, b2)


def dynamic_depthwise(u, z, kernel_size, group_channels):
    """Eq. 3-4. z seen as (B,G,K,K,Y,X); channel c uses group c // group_channels; zero padding; cross-correlation."""
    B, C, Y, X = u.shape
    K, G = kernel_size, C // group_channels
    assert K % 2 == 1
    assert G * group_channels == C
    kernel = z.reshape(B, G, K, K, Y, X)
    planes = []
    for c in range(C):
        g = c // group_channels
        rows = []
        for y in range(Y):
            row = []
            for x in range(X):
                o = torch.zeros(B, dtype=u.dtype)
                for a in range(K):
                    for e in range(K):
                        sy, sx = y + a - K // 2, x + e - K // 2
                        if 0 <= sy < Y and 0 <= sx < X:
                            o = o + kernel[:, g, a, e, y, x] * u[:, c, sy, sx]
                row.append(o)
            rows.append(torch.stack(row, -1))
        planes.append(torch.stack(rows, -2))
    return torch.stack(planes, 1)


def mhdlsa(x, w0, w1, b1, dw, dwb, w2, b2, w3, group_channels):
    """Eq. 1-5. w0, w3 (C,C) without bias; the rest as in dynamic_kernels. K is read off dw."""
    u = conv1x1(x, w0)
    z = dynamic_kernels(u, w1, b1, dw, dwb, w2, b2)
    return conv1x1(dynamic_depthwise(u, z, dw.shape[-1], group_channels), w3)


# ---------------------------------------------------------------- SparseGSA
ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": lambda s: 0.5 * s * (1 + torch.erf(s / math.sqrt(2))),
    "sigmoid": torch.sigmoid,
    "identity": lambda s: s,
}


def channel_attention(q, k, v, temperature, num_heads, *, activation="relu", mask=None):
    """Eq. 7-8. q, k, v (B,C,Y,X), temperature (H,1,1) -> (B,C,Y,X), before Wo.

    mask (B,Y,X) bool, True = keep. OPEN: no masks in the code; the account says that a padding mask would zero
    pixels in q, k (before
    the norms) and v. The output at hidden pixels is then 0 here."""
    B, C, Y, X = q.shape
    n = C // num_heads
    if mask is not None:
        m = mask[:, None].to(q.dtype)
        q, k, v = q * m, k * m, v * m
    act = ACTIVATIONS[activation]

    def unit(r):
        return r / torch.clamp(torch.sqrt((r * r).sum()), min=1e-12)

    out = []
    for b in range(B):
        planes = []
        for h in range(num_heads):
            channels = range(h * n, (h + 1) * n)
            qs = [unit(q[b, c].reshape(-1)) for c in channels]
            ks = [unit(k[b, c].reshape(-1)) for c in channels]
            vs = [v[b, c].reshape(-1) for c in channels]
            for i in range(n):
                o = torch.zeros(Y * X, dtype=q.dtype)
                for j in range(n):
                    o = o + act(temperature[h, 0, 0] * (qs[i] * ks[j]).sum()) * vs[j]
                planes.append(o.reshape(Y, X))
        out.append(torch.stack(planes))
    return torch.stack(out)


def tile_starts(n, k):
    """Eq. 9. n <= k: one tile of n. Else c = (n-1)//k + 1 tiles, step ceil((n-k)/(c-1)), the last start is n-k."""
    if n <= k:
        return [0]
    c = (n - 1) // k + 1
    step = math.ceil((n - k) / (c - 1) - 1e-8)
    return [min(m * step, n - k) for m in range(c)]


def tiled_attention(q, k, v, temperature, num_heads, tile, *, activation="relu"):
    """Eq. 6-8 for each tile of q, k, v, overlaps averaged."""
    Y, X = q.shape[2:]
    h, w = min(tile, Y), min(tile, X)
    total = torch.zeros_like(v)
    count = torch.zeros(Y, X, dtype=q.dtype)
    for y in tile_starts(Y, tile):
        for x in tile_starts(X, tile):
            pieces = [t[:, :, y : y + h, x : x + w] for t in (q, k, v)]
            o = channel_attention(*pieces, temperature, num_heads, activation=activation)
            total = total + F.pad(o, (x, X - x - w, y, Y - y - h))
            count[y : y + h, x : x + w] += 1
    return total / count


def sparse_gsa(
    x,
    w_qkv,
    dw_qkv,
    temperature,
    w_out,
    num_heads,
    *,
    b_qkv=None,
    b_dw=None,
    b_out=None,
    activation="relu",
    tile=None,
    mask=None,
):
    """Eq. 6-9. w_qkv (3C,C), dw_qkv (3C,1,3,3), temperature (H,1,1), w_out (C,C). tile=None: the whole map
    (training)."""
    C = x.shape[1]
    qkv = F.conv2d(conv1x1(x, w_qkv, b_qkv), dw_qkv, b_dw, padding=1, groups=3 * C)
    q, k, v = qkv[:, :C], qkv[:, C : 2 * C], qkv[:, 2 * C :]
    if tile is None:
        o = channel_attention(q, k, v, temperature, num_heads, activation=activation, mask=mask)
    else:
        assert mask is None
        o = tiled_attention(q, k, v, temperature, num_heads, tile, activation=activation)
    return conv1x1(o, w_out, b_out)


# ---------------------------------------------------------------- block
def layer_norm(x, weight, bias, eps=1e-5):
    """Over channels at each pixel; weight, bias (C,)."""
    C = x.shape[1]
    mean = x.sum(1, keepdim=True) / C
    var = ((x - mean) ** 2).sum(1, keepdim=True) / C
    return (x - mean) / torch.sqrt(var + eps) * weight[None, :, None, None] + bias[None, :, None, None]


def gdfn(x, w_in, dw, w_out):
    """w_in (2F,C), dw (2F,1,3,3), w_out (C,F), no biases: GELU(a) * b."""
    n = w_out.shape[1]
    h = F.conv2d(conv1x1(x, w_in), dw, padding=1, groups=2 * n)
    return conv1x1(ACTIVATIONS["gelu"](h[:, :n]) * h[:, n:], w_out)


def hdtb(x, norms, local, ffn1, sparse, ffn2):
    """norms: four (weight, bias); local, sparse: functions map -> map (mhdlsa, sparse_gsa with parameters); ffn1,
    ffn2: gdfn's weights."""
    x = x + local(layer_norm(x, *norms[0]))
    x = x + gdfn(layer_norm(x, *norms[1]), *ffn1)
    x = x + sparse(layer_norm(x, *norms[2]))
    return x + gdfn(layer_norm(x, *norms[3]), *ffn2)
