"""FFTNet (Fein-Ashley 2025, arXiv 2502.18394): the spectral mixing in form A (modReLU), by a plain Fourier sum."""

import math

import torch
from torch import Tensor


def naive_fftnet(
    x: Tensor,
    base_filter: Tensor,
    modrelu_bias: Tensor,
    mlp: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    norm: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """x (B,T,M), base_filter and modrelu_bias (H,F,1) with F = T//2 + 1 -> (B,T,M), float64.

    mlp = (W1 (M,M), b1 (M), W2 (H*F,M), b2 (H*F)), None = not adaptive. norm = (weight, bias): then the result is
    LayerNorm(x + y), eps 1e-5; else y, the inverse transform, alone.
    """
    x = x.double()
    B, T, M = x.shape
    H, F = base_filter.shape[:2]
    width = M // H
    rows = []
    for b in range(B):
        f = [[base_filter[h, n, 0].double() for n in range(F)] for h in range(H)]
        if mlp is not None:
            w1, b1, w2, b2 = (z.double() for z in mlp)
            context = sum(x[b, t] for t in range(T)) / T
            hidden = [w1[m] @ context + b1[m] for m in range(M)]
            hidden = [0.5 * z * (1 + torch.erf(z / math.sqrt(2))) for z in hidden]
            d = [torch.tanh(w2[n] @ torch.stack(hidden) + b2[n]) for n in range(H * F)]
            f = [[f[h][n] + d[h * F + n] for n in range(F)] for h in range(H)]
        columns = []
        for m in range(M):
            h = m // width
            spectrum = []
            for n in range(F):
                angles = [2 * math.pi * n * t / T for t in range(T)]
                real = sum(x[b, t, m] * math.cos(a) for t, a in enumerate(angles)) / math.sqrt(T) * f[h][n]
                imag = -sum(x[b, t, m] * math.sin(a) for t, a in enumerate(angles)) / math.sqrt(T) * f[h][n]
                square = real * real + imag * imag
                size = torch.sqrt(square) if float(square.detach()) > 0 else 0 * square
                gain = torch.relu(size + modrelu_bias[h, n, 0].double()) / size.clamp(min=1e-3)
                spectrum.append((real * gain, imag * gain))
            cells = []
            for t in range(T):
                total = spectrum[0][0]  # its imaginary part is ignored
                for n in range(1, F):
                    angle = 2 * math.pi * n * t / T
                    term = spectrum[n][0] * math.cos(angle) - spectrum[n][1] * math.sin(angle)
                    if T % 2 == 0 and n == T // 2:
                        total = total + spectrum[n][0] * math.cos(angle)
                    else:
                        total = total + 2 * term
                cells.append(total / math.sqrt(T))
            columns.append(torch.stack(cells))
        rows.append(torch.stack(columns, 1))
    y = torch.stack(rows)
    return y if norm is None else _layer_norm(x + y, *norm)


def naive_fftnet_b(
    x: Tensor,
    base_filter: Tensor,
    base_bias: Tensor,
    mlp: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    pre_norm: tuple[Tensor, Tensor],
) -> Tensor:
    """Form B, the later code: normalised first, a real offset, gelu of the size; mlp gives 2HF numbers (h, n, 2).

    Returns x + y.
    """
    x = x.double()
    z = _layer_norm(x, *pre_norm)
    B, T, M = x.shape
    H, F = base_filter.shape[:2]
    width = M // H
    rows = []
    for b in range(B):
        scale = [[torch.zeros((), dtype=torch.float64)] * F for _ in range(H)]
        offset = [[torch.zeros((), dtype=torch.float64)] * F for _ in range(H)]
        if mlp is not None:
            w1, b1, w2, b2 = (p.double() for p in mlp)
            context = sum(z[b, t] for t in range(T)) / T
            hidden = [w1[m] @ context + b1[m] for m in range(M)]
            hidden = torch.stack([0.5 * a * (1 + torch.erf(a / math.sqrt(2))) for a in hidden])
            scale = [[w2[2 * (h * F + n)] @ hidden + b2[2 * (h * F + n)] for n in range(F)] for h in range(H)]
            offset = [[w2[2 * (h * F + n) + 1] @ hidden + b2[2 * (h * F + n) + 1] for n in range(F)] for h in range(H)]
        columns = []
        for m in range(M):
            h = m // width
            spectrum = []
            for n in range(F):
                f = base_filter[h, n, 0].double() * (1 + scale[h][n])
                real = sum(z[b, t, m] * math.cos(2 * math.pi * n * t / T) for t in range(T)) / math.sqrt(T) * f
                imag = -sum(z[b, t, m] * math.sin(2 * math.pi * n * t / T) for t in range(T)) / math.sqrt(T) * f
                real = real + base_bias[h, n, 0].double() + offset[h][n]
                square = real * real + imag * imag
                size = torch.sqrt(square) if float(square.detach()) > 0 else 0 * square
                gain = 0.5 * size * (1 + torch.erf(size / math.sqrt(2))) / (size + 1e-6)
                spectrum.append((real * gain, imag * gain))
            cells = []
            for t in range(T):
                total = spectrum[0][0]
                for n in range(1, F):
                    angle = 2 * math.pi * n * t / T
                    if T % 2 == 0 and n == T // 2:
                        total = total + spectrum[n][0] * math.cos(angle)
                    else:
                        total = total + 2 * (spectrum[n][0] * math.cos(angle) - spectrum[n][1] * math.sin(angle))
                cells.append(total / math.sqrt(T))
            columns.append(torch.stack(cells))
        rows.append(torch.stack(columns, 1))
    return x + torch.stack(rows)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        centred = token - token.mean()
        rows.append(centred / torch.sqrt((centred * centred).mean() + 1e-5) * weight.double() + bias.double())
    return torch.stack(rows).reshape(x.shape)
