"""PADRe, cell by cell. Its author has read neither code nor tests."""

import torch


def linear(z, w, b=None):
    y = torch.stack([(row * z).sum() for row in w])
    return y if b is None else y + b


def polynomial_recursion(ys, mix):
    """ys: list Y_1..Y_d, mix: list of d-1 functions Z -> C_i Z D_i -> list Z_1..Z_d."""
    zs = [ys[0]]
    for c, y in zip(mix, ys[1:], strict=True):
        zs.append(c(zs[-1]) * y)
    return zs


def general_output(zs, weights, constant):
    """P = sum_i W_i (.) Z_i + L; weights: list of W_i like Z_i."""
    out = constant
    for w, z in zip(weights, zs, strict=True):
        out = out + w * z
    return out


def dense_map(x, a, b):
    """x (N,M), a (N,N), b (M,M): (A X B)[n,m] = sum_{s,c} A[n,s] X[s,c] B[c,m]."""
    n, m = x.shape
    rows = []
    for i in range(n):
        mixed = sum(a[i, s] * x[s] for s in range(n))
        rows.append(torch.stack([sum(mixed[c] * b[c, j] for c in range(m)) for j in range(m)]))
    return torch.stack(rows)


def map_2d(x, pw, pw_bias, dw, dw_bias, keep=None):
    """One map: 1x1 convolution, then depthwise k x k, zero padding. x (C,Y,X), dw (C,k,k), keep (Y,X).

    keep: padded cells are set to zero before the depthwise step and after it.
    """
    channels, height, width = x.shape
    k = dw.shape[-1]
    real = [[keep is None or bool(keep[y, c]) for c in range(width)] for y in range(height)]
    zero = x.new_zeros(channels)
    u = [[linear(x[:, y, c], pw, pw_bias) if real[y][c] else zero for c in range(width)] for y in range(height)]
    out = []
    for y in range(height):
        for c in range(width):
            acc = zero if dw_bias is None else dw_bias
            for i in range(k):
                for j in range(k):
                    yy, cc = y + i - k // 2, c + j - k // 2
                    if 0 <= yy < height and 0 <= cc < width:
                        acc = acc + dw[:, i, j] * u[yy][cc]
            out.append(acc if real[y][c] else zero)
    return torch.stack(out).reshape(height, width, channels).permute(2, 0, 1)


def map_1d(x, pw, pw_bias, dw, dw_bias, keep=None, causal=False):
    """The same on a sequence. x (T,M), dw (M,k), keep (T,). causal: tap k-1 sits on the token itself, others before."""
    length, dim = x.shape
    k = dw.shape[-1]
    real = [keep is None or bool(keep[t]) for t in range(length)]
    zero = x.new_zeros(dim)
    u = [linear(x[t], pw, pw_bias) if real[t] else zero for t in range(length)]
    out = []
    for t in range(length):
        acc = zero if dw_bias is None else dw_bias
        for i in range(k):
            s = t + i - (k - 1 if causal else k // 2)
            if 0 <= s < length:
                acc = acc + dw[:, i] * u[s]
        out.append(acc if real[t] else zero)
    return torch.stack(out)


def polynomial_mixer(x, first, later, out=None, *, keep=None, causal=False):
    """returns Z_d alone. x (B,C,Y,X) or (B,T,M).

    first: d tuples (pw, pw_bias, dw, dw_bias) for Y_1..Y_d; later: d-1 such tuples for the maps of Z_1..Z_{d-1};
    out: (weight, bias) of the optional output map over channels; keep (B,Y,X) or (B,T), true = real.
    """
    samples = []
    for b in range(len(x)):
        on = None if keep is None else keep[b]
        if x.dim() == 4:
            ys = [map_2d(x[b], *p, keep=on) for p in first]
            mix = [lambda z, p=p, on=on: map_2d(z, *p, keep=on) for p in later]
        else:
            ys = [map_1d(x[b], *p, keep=on, causal=causal) for p in first]
            mix = [lambda z, p=p, on=on: map_1d(z, *p, keep=on, causal=causal) for p in later]
        z = polynomial_recursion(ys, mix)[-1]
        if out is not None:
            flat = z.reshape(z.shape[0], -1).T if x.dim() == 4 else z
            rows = torch.stack([linear(row, *out) for row in flat])
            if on is not None:
                rows = torch.stack([r if bool(m) else r * 0 for r, m in zip(rows, on.reshape(-1), strict=True)])
            z = rows.T.reshape(z.shape) if x.dim() == 4 else rows
        samples.append(z)
    return torch.stack(samples)
