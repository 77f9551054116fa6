"""Unidirectional block attention in both directions, with clamped or dropped borders, by somebody who saw the
equations only.

Streaming in raster order of blocks equals this function (left-top), as block (I, J) reads no later block.
"""

import torch

from naive import linear, softmax

OFFSETS = {
    "left-top": [(0, 0), (-1, -1), (0, -1), (-1, 0)],  # self, left top, left, top
    "right-bottom": [(0, 0), (1, 1), (1, 0), (0, 1)],
}  # self, right bottom, bottom, right


def allowed(grid, block, direction="left-top"):
    """(N, N) bool, tokens row-major: may query i see key j?"""
    Y, X = grid
    a = torch.zeros(Y * X, Y * X, dtype=torch.bool)
    for i in range(Y * X):
        for j in range(Y * X):
            d = (j // X // block - i // X // block, j % X // block - i % X // block)
            a[i, j] = d in OFFSETS[direction]
    return a


def rotary(vec, row, col):
    """First half of the features turned by the row, second by the column, interleaved pairs."""
    half = len(vec) // 2
    new = []
    for f in range(0, len(vec), 2):
        pos, i = (row, f // 2) if f < half else (col, (f - half) // 2)
        t = torch.tensor(float(pos), dtype=vec.dtype) * 10000.0 ** (-2 * i / half)
        new += [vec[f] * t.cos() - vec[f + 1] * t.sin(), vec[f] * t.sin() + vec[f + 1] * t.cos()]
    return torch.stack(new)


def norm(vec, w, b, eps=1e-6):
    m = vec.mean()
    return (vec - m) / torch.sqrt(((vec - m) ** 2).mean() + eps) * w + b


def uniba(
    x,
    Wqkv,
    bqkv,
    Wd,
    bd,
    *,
    grid,
    heads,
    block,
    direction="left-top",
    R=None,
    ln=None,
    ln_k=None,
    rope=True,
    border="clamp",
    origin=(0, 0),
):
    """x (B, Y*X, M) row-major -> same. R (4, H, D) key offsets or None; ln (weight, bias) over D of q AND k (one norm,
    as the code does); ln_k gives the keys their own. border "drop" leaves absent neighbours out: "clamp" if R is None.
    origin: coordinates of the first token. With R the output depends on it, as R is added after the rotary turn."""
    B, N, M = x.shape
    Y, X = grid
    D = M // heads
    out = []
    for b in range(B):
        q, k, v = {}, {}, {}
        for n in range(N):
            f = linear(x[b, n], Wqkv, bqkv)
            for h in range(heads):
                qh, kh, vh = (f[c * M + h * D : c * M + (h + 1) * D] for c in range(3))
                if ln is not None:
                    qh, kh = norm(qh, *ln), norm(kh, *(ln_k or ln))
                if rope:
                    qh, kh = (rotary(t, n // X + origin[0], n % X + origin[1]) for t in (qh, kh))
                q[h, n], k[h, n], v[h, n] = qh, kh, vh
        rows = []
        for n in range(N):
            I, J = n // X // block, n % X // block
            seen = []  # (number of the neighbour, token)
            for r, (dI, dJ) in enumerate(OFFSETS[direction]):
                KI, KJ = I + dI, J + dJ
                if not (0 <= KI < Y // block and 0 <= KJ < X // block):
                    if border == "drop":
                        continue
                    KI, KJ = min(max(KI, 0), Y // block - 1), min(max(KJ, 0), X // block - 1)
                seen += [(r, j) for j in range(N) if j // X // block == KI and j % X // block == KJ]
            parts = []
            for h in range(heads):
                p = softmax([(q[h, n] * (k[h, j] if R is None else k[h, j] + R[r, h])).sum() / D**0.5 for r, j in seen])
                parts.append(sum(w * v[h, j] for w, (_, j) in zip(p, seen)))
            rows.append(linear(torch.cat(parts), Wd, bd))
        out.append(torch.stack(rows))
    return torch.stack(out)
