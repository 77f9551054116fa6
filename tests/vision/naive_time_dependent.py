"""DiffiT's time-dependent attention, its block and its latent model, in loops.

Its author saw only an account of the equations, neither code nor tests of the library.
"""

import math

import torch
import torch.nn.functional as F


def window_size(window):
    return (window, window) if isinstance(window, int) else tuple(window)


def relative_bias(table, window):
    """table ((2Y-1)(2X-1), H) -> (H,N,N): entry (i,j) is table[(dy + Y-1)(2X-1) + dx + X-1, h], dy = y_i - y_j, dx =
    x_i - x_j."""
    Y, X = window_size(window)
    H = table.shape[1]
    out = torch.empty(H, Y * X, Y * X, dtype=table.dtype)
    for h in range(H):
        for i in range(Y * X):
            for j in range(Y * X):
                dy, dx = i // X - j // X, i % X - j % X
                out[h, i, j] = table[(dy + Y - 1) * (2 * X - 1) + dx + X - 1, h]
    return out


def attend(q, k, v, num_heads, *, bias=None, score_bias=None, mask=None):
    """Eq. 2-3 without Wo. q, k, v (B,N,M); bias (H,N,N); score_bias (B,H,N) one number a key; mask (B,N) bool, True =
    keep the key."""
    B, N, M = q.shape
    D = M // num_heads
    out = []
    for b in range(B):
        rows = []
        for i in range(N):
            heads = []
            for h in range(num_heads):
                c = slice(h * D, (h + 1) * D)
                keys = [j for j in range(N) if mask is None or bool(mask[b, j])]
                s = []
                for j in keys:
                    u = (q[b, i, c] / math.sqrt(D) * k[b, j, c]).sum()
                    if bias is not None:
                        u = u + bias[h, i, j]
                    if score_bias is not None:
                        u = u + score_bias[b, h, j]
                    s.append(u)
                a = torch.softmax(torch.stack(s), 0)
                heads.append(sum(a[n] * v[b, j, c] for n, j in enumerate(keys)))
            rows.append(torch.cat(heads))
        out.append(torch.stack(rows))
    return torch.stack(out)


def tmsa(x, time, w_qkv, b_qkv, w_time, b_time, w_out, b_out, num_heads, window, *, table=None, mask=None):
    """Eq. 1-3. x (B,N,M) one window, row-major; time (B,Mt); w_qkv (3M,M), b_qkv (3M,) or None; w_time (3M,Mt),
    b_time (3M,);
    w_out (M,M), b_out (M,); table ((2Y-1)(2X-1),H) or None (relative_bias=False); mask (B,N) bool or None -> (B,N,M).

    q, k, v in this order in the 3M rows. time=None drops the time term (the released code scrambles that branch: not
    copied).
    OPEN: padding mask isn't in the code ("add to S as usual"); rows of hidden queries are computed too, a sample
    needs one visible key."""
    _B, _N, M = x.shape
    qkv = F.linear(x, w_qkv, b_qkv)
    if time is not None:
        qkv = qkv + F.linear(time, w_time, b_time)[:, None, :]
    q, k, v = qkv[..., :M], qkv[..., M : 2 * M], qkv[..., 2 * M :]
    bias = None if table is None else relative_bias(table, window)
    return F.linear(attend(q, k, v, num_heads, bias=bias, mask=mask), w_out, b_out)


def tmsa_cheap(x, time, w_qkv, b_qkv, w_time, b_time, w_out, b_out, num_heads, window, *, table=None, mask=None):
    """Eq. 6, the same function: S_ij = q_i.k_j + q_t.k_j (scaled), then v_t Wo^T added to every token; the key third
    of w_time, b_time
    and of b_qkv isn't read. (q_i here has b_q; q_t.b_k and q_i.b_k are the same for all keys j, so they drop out.)"""
    B, N, M = x.shape
    D = M // num_heads
    z = torch.zeros(M, dtype=x.dtype)
    bq, bv = (z, z) if b_qkv is None else (b_qkv[:M], b_qkv[2 * M :])
    q = F.linear(x, w_qkv[:M], bq)
    k = F.linear(x, w_qkv[M : 2 * M])
    v = F.linear(x, w_qkv[2 * M :], bv)
    qt = F.linear(time, w_time[:M], b_time[:M])
    vt = F.linear(time, w_time[2 * M :], b_time[2 * M :])
    score = torch.empty(B, num_heads, N, dtype=x.dtype)
    for b in range(B):
        for h in range(num_heads):
            c = slice(h * D, (h + 1) * D)
            for j in range(N):
                score[b, h, j] = (qt[b, c] * k[b, j, c]).sum() / math.sqrt(D)
    bias = None if table is None else relative_bias(table, window)
    o = attend(q, k, v, num_heads, bias=bias, score_bias=score, mask=mask)
    return F.linear(o, w_out, b_out) + F.linear(vt, w_out)[:, None, :]


def layer_norm(x, eps=1e-6):
    """No scale, no shift."""
    M = x.shape[-1]
    mean = x.sum(-1, keepdim=True) / M
    var = ((x - mean) ** 2).sum(-1, keepdim=True) / M
    return (x - mean) / torch.sqrt(var + eps)


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def diffit_block(x, time, attn, mlp, num_heads, window, *, table=None, mask=None):
    """Eq. 4. attn = (w_qkv, b_qkv, w_time, b_time, w_out, b_out), mlp = (w1 (4M,M), b1, w2 (M,4M), b2)."""
    x = x + tmsa(layer_norm(x), time, *attn, num_heads, window, table=table, mask=mask)
    w1, b1, w2, b2 = mlp
    return x + F.linear(gelu_tanh(F.linear(layer_norm(x), w1, b1)), w2, b2)


def on_map(x, time, attn, num_heads, window, *, table=None):
    """FeatureMixer form. x (B,C,Y,X) with Y, X multiples of the window; every window of a sample gets that sample's
    time vector."""
    B, C, Y, X = x.shape
    h, w = window_size(window)
    assert Y % h == 0
    assert X % w == 0
    out = torch.empty_like(x)
    for b in range(B):
        for y in range(0, Y, h):
            for i in range(0, X, w):
                t = x[b, :, y : y + h, i : i + w].reshape(C, h * w).T[None]
                o = tmsa(t, time[b : b + 1], *attn, num_heads, window, table=table)
                out[b, :, y : y + h, i : i + w] = o[0].T.reshape(C, h, w)
    return out


# --- latent model
def time_features(t, dim=256, max_period=10000.0):
    """t (B,) -> (B,dim): cosines first, then sines, frequencies max_period^(-n / half)."""
    half = dim // 2
    f = [math.exp(-math.log(max_period) * n / half) for n in range(half)]
    rows = []
    for s in t:
        row = [torch.cos(s * u) for u in f] + [torch.sin(s * u) for u in f]
        rows.append(torch.stack(row + [torch.zeros_like(s)] * (dim % 2)))
    return torch.stack(rows)


def time_vector(t, w1, b1, w2, b2, *, labels=None, label_table=None, features=256):
    """Linear(SiLU(Linear(sinusoid))) + label row; the last row of label_table (classes + 1, M) is "no class"."""
    h = F.linear(time_features(t, features), w1, b1)
    h = F.linear(h / (1 + torch.exp(-h)), w2, b2)
    return h if labels is None else h + torch.stack([label_table[int(n)] for n in labels])


def positions(M, Y, X):
    """Fixed table (Y X, M): first half of the channels codes the COLUMN x, second half the row y (order of the
    released code); in each
    half sines first, then cosines, frequencies 10000^(-n / (M/4))."""
    assert M % 4 == 0
    f = [10000.0 ** (-n / (M / 4)) for n in range(M // 4)]

    def axis(p):
        return [math.sin(p * u) for u in f] + [math.cos(p * u) for u in f]

    return torch.tensor([axis(i) + axis(y) for y in range(Y) for i in range(X)], dtype=torch.float64)


def latent_model(image, time, patch_w, patch_b, blocks, last_w, last_b, patch):
    """Eq. 5. image (B,Cin,Y,X); patch_w (M,Cin,p,p), stride p; blocks: functions (tokens, time) -> tokens; last_w (p
    p Cout, M), zero at
    init -> (B,Cout,Y,X). The p p Cout numbers of a token are ordered row, column, channel (channel fastest)."""
    p = patch
    z = F.conv2d(image, patch_w, patch_b, stride=p)
    B, M, h, w = z.shape
    x = z.reshape(B, M, h * w).transpose(1, 2) + positions(M, h, w)
    for block in blocks:
        x = block(x, time)
    x = layer_norm(x)
    x = F.linear(x / (1 + torch.exp(-x)), last_w, last_b)
    C = last_w.shape[0] // (p * p)
    out = torch.empty(B, C, h * p, w * p, dtype=x.dtype)
    for n in range(h * w):
        for a in range(p):
            for e in range(p):
                for c in range(C):
                    out[:, c, (n // w) * p + a, (n % w) * p + e] = x[:, n, (a * p + e) * C + c]
    return out


def guidance_scale(s, t, steps=1000, power=4.0):
    """1 + (s - 1) (1 - cos(pi (1 - t/T)^power)) / 2, for the 256 model; only the first 3 channels are guided."""
    return 1 + (s - 1) * (1 - math.cos(math.pi * (1 - t / steps) ** power)) / 2
