"""Mega by its formulas, one batch row, query, key, channel and state at a time."""

import math

import torch
from torch import Tensor


def naive_ema(x: Tensor, delta: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """Step 3, one direction: damped multi-dimensional moving average of x (T, M); parameters (M, N) -> (T, M).

    h_t = (1 - p a) h_{t-1} + p beta x_t, e_t = sum_n gamma_n h_{t,n} / sqrt(N), where p = sigmoid(delta)
    and a = sigmoid(alpha).
    """
    T, M = x.shape
    N = delta.shape[1]
    columns = []
    for m in range(M):
        p, a = torch.sigmoid(delta[m]), torch.sigmoid(alpha[m])
        h = [torch.zeros((), dtype=x.dtype) for _ in range(N)]
        column = []
        for t in range(T):
            e = torch.zeros((), dtype=x.dtype)
            for n in range(N):
                h[n] = (1 - p[n] * a[n]) * h[n] + p[n] * beta[m, n] * x[t, m]
                e = e + h[n] * gamma[m, n] / math.sqrt(N)
            column.append(e)
        columns.append(torch.stack(column))
    return torch.stack(columns, 1)


def naive_relative_bias(w: Tensor, i: int, j: int) -> Tensor:
    """The simple relative bias: w (2 P - 1) at (P - 1) + j - i."""
    return w[(w.shape[0] - 1) // 2 + j - i]


def naive_rotary_bias(a: Tensor, b: Tensor, i: int, j: int) -> Tensor:
    """The rotary relative bias: a (Z) turned to position i, b (Z) to j, and their dot product (half-split pairs)."""

    def turned(z: Tensor, at: int) -> list[Tensor]:
        half = z.shape[0] // 2
        first, second = [], []
        for m in range(half):
            angle = at * 10000 ** (-m / half)
            first.append(z[m] * math.cos(angle) - z[m + half] * math.sin(angle))
            second.append(z[m + half] * math.cos(angle) + z[m] * math.sin(angle))
        return first + second

    return sum(x * y for x, y in zip(turned(a, i), turned(b, j), strict=True))  # type: ignore[return-value]


def naive_norm(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """Of one token (M): layer norm; or x over its root mean square, times M weights ("rms") or one number ("scale")."""
    if kind == "layer":
        mean = x.mean()
        return (x - mean) / torch.sqrt(((x - mean) ** 2).mean() + 1e-5) * weight + bias
    return x / torch.sqrt((x**2).mean() + 1e-5) * weight


def naive_mega(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    delta: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    Wv: Tensor,
    bv: Tensor,
    Wmx: Tensor,
    bmx: Tensor,
    Wh: Tensor,
    bh: Tensor,
    kappa: Tensor,
    mu: Tensor,
    bias: Tensor,
    *,
    causal: bool,
    chunk: int | None = None,
    function: str = "softmax",
    keep: Tensor | None = None,
    norm: str = "layer",
    post_norm: bool = False,
) -> Tensor:
    """Steps 1 to 8 with pre-norm, or with the norm after step 8 and none before (eps 1e-5) -> y (B, T, M).

    x (B, T, M); EMA parameters (M, N) when causal, (2 M, N) when not (first M forward, last M backward); omega (M);
    Wv (E, M), Wmx (Z + E + 2 M, M), Wh (M, E) and their biases; kappa, mu (2, Z); bias: either w (2 P - 1), the simple
    relative bias, or two rows (2, Z), the rotary one. `chunk`: C, dividing T. `function`: "softmax", "laplace" or
    "relu2". keep (B, T): True = a real token; a query whose chunk has no real key gets o = 0. Rows of padded tokens
    are computed like the others and mean nothing.
    """
    B, T, M = x.shape
    E, Z = Wv.shape[0], kappa.shape[1]
    C = T if chunk is None else chunk
    rows = []
    for b in range(B):
        real = [True] * T if keep is None else [bool(one) for one in keep[b]]
        normed, values = [], []
        for t in range(T):
            xn = x[b, t] if post_norm else naive_norm(x[b, t], norm_weight, norm_bias, norm)
            normed.append(xn)
            value = Wv @ xn + bv
            values.append(value * torch.sigmoid(value))
        seen = torch.stack([xn if real[t] else torch.zeros_like(xn) for t, xn in enumerate(normed)])
        e = naive_ema(seen, delta[:M], alpha[:M], beta[:M], gamma[:M])
        if not causal:
            e = e + naive_ema(seen.flip(0), delta[M:], alpha[M:], beta[M:], gamma[M:]).flip(0)
        us, rs, hxs, qs, ks = [], [], [], [], []
        for t in range(T):
            m = e[t] + omega * normed[t]
            mixed = Wmx @ (m * torch.sigmoid(m)) + bmx
            us.append(torch.sigmoid(mixed[:M]))
            z = mixed[M : M + Z]
            z = z * torch.sigmoid(z)
            r = mixed[M + Z : M + Z + E]
            rs.append(r * torch.sigmoid(r))
            hxs.append(mixed[M + Z + E :])
            qs.append(kappa[0] * z + mu[0])
            ks.append(kappa[1] * z + mu[1])
        ys = []
        for t in range(T):
            start = t // C * C
            i = t - start
            keys = [j for j in range(C) if real[start + j] and (j <= i or not causal)]
            scores = []
            for j in keys:
                s = torch.dot(qs[t], ks[start + j])
                b_ij = naive_relative_bias(bias, i, j) if bias.dim() == 1 else naive_rotary_bias(bias[0], bias[1], i, j)
                if function == "softmax":
                    scores.append(s / math.sqrt(Z) + b_ij)
                else:
                    n = i + 1 if causal else max(1, sum(real[start : start + C]))
                    scores.append(s / n + b_ij)
            weights = []
            if scores and function == "softmax":
                largest = max(float(s.detach()) for s in scores)
                exps = [torch.exp(s - largest) for s in scores]
                weights = [one / sum(exps) for one in exps]
            elif function == "laplace":
                weights = [0.5 * (1 + torch.erf((s - 0.707107) / (0.282095 * math.sqrt(2)))) for s in scores]
            elif function == "relu2":
                weights = [torch.relu(s) ** 2 for s in scores]
            o = torch.zeros(E, dtype=x.dtype)
            for weight, j in zip(weights, keys, strict=True):
                o = o + weight * values[start + j]
            hh = hxs[t] + Wh @ (o * rs[t]) + bh
            hh = hh * torch.sigmoid(hh)
            y = us[t] * hh + (1 - us[t]) * x[b, t]
            ys.append(naive_norm(y, norm_weight, norm_bias, norm) if post_norm else y)
        rows.append(torch.stack(ys))
    return torch.stack(rows)
