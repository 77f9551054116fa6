"""TCSR's block and its feed-forward: loops over pixels.

Their author saw only the paper's account, neither code nor test of the library.
"""

import math

import torch
import torch.nn.functional as F


def layer_norm(x, weight, bias, *, eps=1e-6):
    """LN over channels at each pixel, weight, bias (C,). OPEN: the norm and eps 1e-6 are guessed from a
    follow-up's code (house style)."""
    B, C, Y, X = x.shape
    out = torch.empty_like(x)
    for b in range(B):
        for y in range(Y):
            for i in range(X):
                u = x[b, :, y, i]
                mean = u.sum() / C
                var = ((u - mean) ** 2).sum() / C
                out[b, :, y, i] = (u - mean) / torch.sqrt(var + eps) * weight + bias
    return out


def window_start(i, n, w):
    """First place of the window of w places around i on an axis of n >= w, moved inward at the border (odd w)."""
    return min(max(i - w // 2, 0), n - w)


def neighborhood_attention(x, wq, bq, wk, bk, wv, bv, wo, bo, num_heads, window, *, table=None):
    """Eq. 2. wq, wk, wv, wo (C,C), biases (C,); table None or (H, 2w-1, 2w-1): R_{j-i} = table[h, jy-iy+w-1,
    jx-ix+w-1].

    Head h takes channels h*D..(h+1)*D. Every pixel has exactly w*w keys."""
    B, C, Y, X = x.shape
    H, D, w = num_heads, C // num_heads, window
    assert w % 2 == 1
    assert w <= min(Y, X)
    tok = x.permute(0, 2, 3, 1)
    q, k, v = F.linear(tok, wq, bq), F.linear(tok, wk, bk), F.linear(tok, wv, bv)  # (B,Y,X,C)
    rows = []
    for b in range(B):
        for y in range(Y):
            for i in range(X):
                ys, xs = window_start(y, Y, w), window_start(i, X, w)
                keys = [(a, e) for a in range(ys, ys + w) for e in range(xs, xs + w)]
                heads = []
                for h in range(H):
                    c = slice(h * D, (h + 1) * D)
                    s = []
                    for a, e in keys:
                        u = (q[b, y, i, c] * k[b, a, e, c]).sum() / math.sqrt(D)
                        if table is not None:
                            u = u + table[h, a - y + w - 1, e - i + w - 1]
                        s.append(u)
                    p = torch.softmax(torch.stack(s), 0)
                    heads.append(sum(p[n] * v[b, a, e, c] for n, (a, e) in enumerate(keys)))
                rows.append(torch.cat(heads))
    o = F.linear(torch.stack(rows).reshape(B, Y, X, C), wo, bo)
    return o.permute(0, 3, 1, 2)


MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def shift(h, *, step=1, n_div=4, directions=("up", "down", "left", "right")):
    """Parameter-free move: group n of g = C // n_div channels goes `step` pixels in directions[n]; the rest stay;
    zeros come in.

    "up" means that the content moves up: out[y] = in[y + step].
    OPEN: the account's claim "one changed pixel changes 5 pixels" holds only when some channels stay (n_div > 4);
    with n_div 4 it's 4.
    OPEN: number of groups, step and order of directions are inferred (the account lists up, down, left, right;
    n_div 4 = all channels)."""
    C, Y, X = h.shape[1:]
    g = C // n_div
    assert g >= 1
    assert len(directions) * g <= C
    out = torch.zeros_like(h)
    for c in range(C):
        n = c // g
        dy, dx = MOVES[directions[n]] if n < len(directions) else (0, 0)
        for y in range(Y):
            for i in range(X):
                sy, sx = y - dy * step, i - dx * step
                if 0 <= sy < Y and 0 <= sx < X:
                    out[:, c, y, i] = h[:, c, sy, sx]
    return out


def shift_feed_forward(
    z,
    w1,
    w2,
    b1=None,
    b2=None,
    *,
    step=1,
    n_div=4,
    directions=("up", "down", "left", "right"),
    shift_at="after",
    second_activation=False,
    approximate="none",
):
    """Eq. 4 (EFFN). z (B,C,Y,X), w1 (rC,C), w2 (C,rC), optional biases.

    shift_at "after": h = shift(gelu(W1 z)) (the account's formula); "before": h = gelu(shift(W1 z)).
    OPEN: place of the shift, one more activation after it (second_activation), biases (the parameter count 2 r
    C^2 has none), form of GELU."""
    h = F.conv2d(z, w1[:, :, None, None], b1)

    def act(u):
        return F.gelu(u, approximate=approximate)

    def move(u):
        return shift(u, step=step, n_div=n_div, directions=directions)

    if shift_at == "after":
        h = move(act(h))
        if second_activation:
            h = act(h)
    else:
        assert shift_at == "before"
        h = act(move(h))
    return F.conv2d(h, w2[:, :, None, None], b2)


def tcsr_block(x, ln1, na, ln2, ffn, num_heads, window, *, table=None, eps=1e-6, **shift_options):
    """Eq. 1, 3. ln1, ln2 = (weight, bias); na = (wq, bq, wk, bk, wv, bv, wo, bo); ffn = (w1, w2[, b1, b2])."""
    x = x + neighborhood_attention(layer_norm(x, *ln1, eps=eps), *na, num_heads, window, table=table)
    return x + shift_feed_forward(layer_norm(x, *ln2, eps=eps), *ffn, **shift_options)


def pixel_shuffle(x, s):
    """(B, c s^2, Y, X) -> (B, c, sY, sX): out[c, y s + a, x s + e] = in[c s^2 + a s + e, y, x]."""
    B, C, Y, X = x.shape
    c = C // (s * s)
    out = torch.empty(B, c, s * Y, s * X, dtype=x.dtype)
    for n in range(c):
        for a in range(s):
            for e in range(s):
                for y in range(Y):
                    for i in range(X):
                        out[:, n, y * s + a, i * s + e] = x[:, n * s * s + a * s + e, y, i]
    return out


def small_host(x, first, blocks, middle, last, scale):
    """Eq. 5 (recalled). first, middle, last = (weight, bias) of 3x3 convolutions, padding 1 (last: C -> 3 s^2);
    blocks: functions."""
    f = F.conv2d(x, *first, padding=1)
    h = f
    for block in blocks:
        h = block(h)
    h = F.conv2d(h, *middle, padding=1) + f
    return pixel_shuffle(F.conv2d(h, *last, padding=1), scale)


def parameter_counts(dim, num_heads, window, ratio, *, relative=True):
    """(attention, feed-forward): 4 C^2 + 4 C + H (2w-1)^2 and 2 r C^2 (no biases in the feed-forward)."""
    return 4 * dim * dim + 4 * dim + (num_heads * (2 * window - 1) ** 2 if relative else 0), 2 * ratio * dim * dim
