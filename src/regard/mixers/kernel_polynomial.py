"""Chebyshev polynomials whose higher orders are damped, as in the kernel polynomial method."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from regard.checks import choice

Damping = Literal["none", "fejer", "jackson", "lanczos", "lorentz", "vekic", "wang"]


def gibbs_damping(kind: Damping, order: int, sharpness: float | None = None) -> list[float]:
    """g_0 .. g_K of the kernel polynomial method; `sharpness` is mu of Lanczos (3) or xi of Lorentz (4)."""
    choice("gibbs_damping", get_args(Damping), kind=kind)
    n, c = order + 1, math.pi / (order + 2)
    mu, xi = (3.0, 4.0) if sharpness is None else (sharpness, sharpness)

    def damp(k: int) -> float:
        r = k / n
        if kind == "fejer":
            return 1 - r
        if kind == "jackson":
            return ((n + 1 - k) * math.cos(k * c) + math.sin(k * c) / math.tan(c)) / (n + 1)
        if kind == "lanczos":
            return (math.sin(math.pi * r) / (math.pi * r)) ** mu
        if kind == "lorentz":
            return math.sinh(xi * (1 - r)) / math.sinh(xi)
        if kind == "vekic":
            return (1 - math.tanh((r - 0.5) / (r * (1 - r)))) / 2
        return math.exp(-((2 * r) ** 2)) if kind == "wang" else 1.0

    return [1.0, *(damp(k) for k in range(1, n))]


def chebyshev(z: Float[Tensor, "*b"], c: Float[Tensor, " K1"], damping: list[float]) -> Float[Tensor, "*b"]:
    """f(z) = sum_k c_k g_k T_k(z)."""
    before, now, total = torch.ones_like(z), z, c[0] * damping[0] * torch.ones_like(z)
    for k in range(1, len(damping)):
        total = total + c[k] * damping[k] * now
        before, now = now, 2 * z * now - before
    return total
