"""Long-range grouping attention and the plain layer without grouping, by somebody who saw the equations only."""

import torch

from naive import linear, softmax


def lga(x, Wq, bq, Wk, bk, Wv, bv, Wo, bo, Wc=None, bc=None, *, grid, heads, stride=7, grouped=True):
    """x (B, U, N, M), N = Y*X row-major, grid (Y, X) -> (B, U, N, M). Wc (M,1,3,3), bc (M); None: no signature.
    grouped=False: plain attention inside each view, no signature whatever Wc is."""
    B, U, N, M = x.shape
    Y, X = grid
    assert N == Y * X
    D = M // heads
    out = []
    for b in range(B):
        q = [[linear(x[b, u, n], Wq, bq) for n in range(N)] for u in range(U)]
        k = [[linear(x[b, u, n], Wk, bk) for n in range(N)] for u in range(U)]
        v = [[linear(x[b, u, n], Wv, bv) for n in range(N)] for u in range(U)]
        views = []
        for u in range(U):
            rows = []
            for n in range(N):
                y, xx = n // X, n % X
                if grouped:  # same residues, any view (equation 2)
                    seen = [
                        (t, j)
                        for t in range(U)
                        for j in range(N)
                        if (j // X) % stride == y % stride and (j % X) % stride == xx % stride
                    ]
                else:
                    seen = [(u, j) for j in range(N)]
                parts = []
                for h in range(heads):
                    s = slice(h * D, (h + 1) * D)
                    p = softmax([(q[u][n][s] * k[t][j][s]).sum() * D**-0.5 for t, j in seen])
                    parts.append(sum(p[a] * v[t][j][s] for a, (t, j) in enumerate(seen)))
                o = torch.cat(parts)
                if grouped and Wc is not None:  # signature on the values of this view (equation 4)
                    e = bc
                    for dy in (-1, 0, 1):
                        for dx in (-1, 0, 1):
                            if 0 <= y + dy < Y and 0 <= xx + dx < X:
                                e = e + Wc[:, 0, dy + 1, dx + 1] * v[u][(y + dy) * X + xx + dx]
                    o = o + e
                rows.append(linear(o, Wo, bo))
            views.append(torch.stack(rows))
        out.append(torch.stack(views))
    return torch.stack(out)
