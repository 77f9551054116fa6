"""The gated state space layer as its recurrence, one channel, state and time step at a time."""

import math

import torch
from torch import Tensor


def _layer_norm(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = z.mean()
    return (z - mean) / torch.sqrt(((z - mean) ** 2).mean() + 1e-5) * weight + bias


def _gelu(z: Tensor) -> Tensor:
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def naive_gss(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    Wu: Tensor,
    Wv: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor,
    lr: Tensor,
    li: Tensor,
    C_real: Tensor,
    C_imag: Tensor,
    Dp: Tensor,
    Wg: Tensor,
    Wo: Tensor,
    bo: Tensor,
    *,
    exp_imag: bool = True,
    reverse: bool = False,
) -> Tensor:
    """Steps 1 to 7 with the recurrent form of steps 4 to 6, residual included: x (B, T, M) -> (B, T, M).

    Wu (F, M), Wv (E, M), lr, li (N), C (E, N) as two real tensors, Dp (E), Wg (F, E), Wo (M, F); both norms have eps
    1e-5. `exp_imag`: frequencies are exp(li), else li itself. `reverse`: run on the reversed sequence and turned back.
    """
    B, T, _ = x.shape
    E, N = C_real.shape
    lam = torch.complex(-torch.exp(lr), torch.exp(li) if exp_imag else li)
    abar = torch.exp(lam)
    bbar = (abar - 1) / lam
    C = torch.complex(C_real, C_imag)
    rows = []
    for b in range(B):
        order = list(range(T))[::-1] if reverse else list(range(T))
        h = [[torch.zeros((), dtype=abar.dtype) for _ in range(N)] for _ in range(E)]
        outs: dict[int, Tensor] = {}
        for t in order:
            z = _layer_norm(x[b, t], norm_weight, norm_bias)
            u = _gelu(Wu @ z)
            w = _layer_norm(_gelu(Wv @ z), inner_weight, inner_bias)
            y = []
            for e in range(E):
                total = Dp[e] * w[e]
                for n in range(N):
                    h[e][n] = abar[n] * h[e][n] + w[e]
                    total = total + (C[e, n] * bbar[n] * h[e][n]).real
                y.append(total)
            outs[t] = Wo @ (u * (Wg @ torch.stack(y))) + bo + x[b, t]
        rows.append(torch.stack([outs[t] for t in range(T)]))
    return torch.stack(rows)
