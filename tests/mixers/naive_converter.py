"""Converter, rotation by rotation. Its author has read neither code nor test."""

import math

import torch


def linear(z, w, b=None):
    y = torch.stack([(row * z).sum() for row in w])
    return y if b is None else y + b


def scale_norm(h, w=1.0):
    """w h / (|h|_2 + 1e-5), h real or complex."""
    return w * h / (torch.sqrt((h * h.conj()).real.sum()) + 1e-5)


def siren(z, w1, b1, norm, w2, b2):
    return torch.sin(linear(scale_norm(torch.sin(linear(z, w1, b1)), norm), w2, b2))


def pool(z, cells):  # cell i takes entries floor(iM/cells) .. ceil((i+1)M/cells) - 1
    return torch.stack([z[i * len(z) // cells : -(-(i + 1) * len(z) // cells)].mean() for i in range(cells)])


def angles(x, net, layout):
    """x (T,M) -> seven runs of T numbers: al_l, be_l, ga_l, al_u, be_u, ga_u, theta.

    layout "released": the (T,7) table is flattened row by row and cut in 7 runs; "token": its transpose.
    """
    table = torch.stack([pool(scale_norm(siren(token, *net)), 7) for token in x])
    return table.T if layout == "token" else table.reshape(7, len(x))


def turn(angle):
    return torch.complex(torch.cos(angle), torch.sin(angle))


def givens(alpha, beta, gamma):
    """the four entries of one rotation."""
    a, b, c = math.pi * (alpha + beta), math.pi * (alpha - beta), math.pi * gamma
    return turn(-a) * torch.cos(c), -turn(b) * torch.sin(c), turn(-b) * torch.sin(c), turn(a) * torch.cos(c)


def rotate(rows, i, g, adjoint=False):
    """Apply rotation g to rows i, i+1 of a list of vectors."""
    a, b, c, d = (g[0].conj(), g[2].conj(), g[1].conj(), g[3].conj()) if adjoint else g
    return rows[:i] + [a * rows[i] + b * rows[i + 1], c * rows[i] + d * rows[i + 1]] + rows[i + 2 :]


def rotations(params, keep):
    """Lower rotations from entries 0..T-2, upper ones from entries 1..T-1; identity where a padded token is touched."""
    low, up = [], []
    for i in range(params.shape[1] - 1):
        on = 1.0 if keep is None or (bool(keep[i]) and bool(keep[i + 1])) else 0.0
        low.append(givens(*(on * params[r, i] for r in (0, 1, 2))))
        up.append(givens(*(on * params[r, i + 1] for r in (3, 4, 5))))
    return low, up, [turn(2 * math.pi * t) for t in params[6]]


def order_of(length, m):
    """P: row j of the result is row order[j] of the input: a (T/m, m) table transposed."""
    return list(range(length)) if m is None else [i * m + j for j in range(m) for i in range(length // m)]


def fourier(rows, low, up, diagonal, permutation=None):
    """Phi V. rows: list of T complex vectors."""
    rows = [rows[j] for j in order_of(len(rows), permutation)]
    for i in reversed(range(len(rows) - 1)):
        rows = rotate(rows, i, up[i])
    for i in range(len(rows) - 1):
        rows = rotate(rows, i, low[i])
    return [d * r for d, r in zip(diagonal, rows, strict=True)]


def inverse_fourier(rows, low, up, diagonal, permutation=None):
    """Phi^H: every step undone in the opposite order."""
    rows = [d.conj() * r for d, r in zip(diagonal, rows, strict=True)]
    for i in reversed(range(len(rows) - 1)):
        rows = rotate(rows, i, low[i], adjoint=True)
    for i in range(len(rows) - 1):
        rows = rotate(rows, i, up[i], adjoint=True)
    return [rows[order_of(len(rows), permutation).index(j)] for j in range(len(rows))]


def response(lam, c, damping=None):
    """c_0 + sum_k c_k g_k T_k(lam). damping: list g_0..g_K (g_0 unused) or None; Fejer: 1 - k/(K+1)."""
    cheb = [torch.ones_like(lam), lam]
    for _ in range(2, len(c)):
        cheb.append(2 * lam * cheb[-1] - cheb[-2])
    return c[0] + sum(c[k] * (1.0 if damping is None else damping[k]) * cheb[k] for k in range(1, len(c)))


def unitary_digraph_conv(x, wr, wi, net_angles, net_lam, coefs, *, m=None, damping=None, layout="released", keep=None):
    """x (B,T,M) real, coefs (K+1,) or (B,K+1), keep (B,T) -> y (B,T,M) complex. nets: (W1, b1, norm, W2, b2)."""
    outs = []
    for b in range(len(x)):
        v = [torch.complex(linear(r, wr), linear(r, wi)) for r in x[b]]
        v = v if keep is None else [r * float(m) for r, m in zip(v, keep[b], strict=True)]
        parts = rotations(angles(x[b], net_angles, layout), None if keep is None else keep[b])
        lam = [siren(r, *net_lam).mean() for r in x[b]]
        freqs = [turn(response(z, coefs[b] if coefs.dim() == 2 else coefs, damping)) for z in lam]
        spectrum = [f * r for f, r in zip(freqs, fourier(v, *parts, m), strict=True)]
        outs.append(torch.stack(inverse_fourier(spectrum, *parts, m)))
    return torch.stack(outs)


def read_out(y, x, norm1, w5r, b5r, w5i, b5i, w6, b6, a, norm2):
    """y (B,T,M) complex, x (B,T,M) -> (B,T,M) real."""
    outs, a = [], torch.clamp(a, 0, 1)
    for z in (y + x).reshape(-1, x.shape[-1]):
        u = scale_norm(z, norm1)
        gate = torch.log1p(torch.exp(linear(u.real, w5r, b5r))) * torch.tanh(linear(u.imag, w5i, b5i))
        outs.append(scale_norm(linear(gate, w6, b6) + a * u.real + (1 - a) * u.imag, norm2))
    return torch.stack(outs).reshape(x.shape)
