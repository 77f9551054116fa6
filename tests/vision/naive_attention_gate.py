"""The additive attention gate of Attention U-Net (arXiv 1804.03999), written out pixel by pixel, 1 to 3 axes."""

import itertools
import math

import torch
from torch import Tensor


def _resize(z: Tensor, sizes: tuple[int, ...], align_corners: bool) -> Tensor:
    """Linear interpolation along every axis. z (*sizes) -> (*wanted sizes)."""
    for axis, want in enumerate(sizes):
        have = z.shape[axis]
        rows = []
        for i in range(want):
            if align_corners:
                at = i * (have - 1) / (want - 1) if want > 1 else 0.0
            else:
                at = max((i + 0.5) * have / want - 0.5, 0.0)
            low = min(math.floor(at), have - 1)
            high = min(low + 1, have - 1)
            rows.append(z.select(axis, low) * (1 - (at - low)) + z.select(axis, high) * (at - low))
        z = torch.stack(rows, axis)
    return z


def _pixel(z: Tensor, at: tuple[int, ...]) -> Tensor:
    """The channels at one place. z (C, *S) -> (C)."""
    return z[(slice(None), *at)]


def _pointwise(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """z (in, *S), weight (out, in), bias (out) -> (out, *S)."""
    out = z.new_zeros(weight.shape[0], *z.shape[1:])
    for at in itertools.product(*map(range, z.shape[1:])):
        for c in range(weight.shape[0]):
            out[(c, *at)] = torch.einsum("i,i->", weight[c], _pixel(z, at)) + bias[c]
    return out


def naive_attention_map(
    x: Tensor,
    g: Tensor,
    theta: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    psi_weight: Tensor,
    psi_bias: Tensor,
    normalise: str = "sigmoid",
    align_corners: bool = False,
) -> Tensor:
    """x (B, Fl, *S), g (B, Fg, *S') -> a (B, 1, *S).

    theta (Fi, Fl, *s) is a convolution with kernel = stride = s, no bias; phi (Fi, Fg) and psi (1, Fi) are pointwise:
    a = up(sigmoid(psi ReLU(theta x + up(phi g)))). normalise "softmax": over all coarse positions in sigmoid's place.
    """
    sizes, step = x.shape[2:], theta.shape[2:]
    coarse = tuple((n - s) // s + 1 for n, s in zip(sizes, step, strict=True))
    out = x.new_zeros(x.shape[0], 1, *sizes)
    for b in range(x.shape[0]):
        gate = _pointwise(g[b], phi_weight, phi_bias)
        gate = torch.stack([_resize(one, coarse, align_corners) for one in gate])
        z = x.new_zeros(coarse)
        for at in itertools.product(*map(range, coarse)):
            total = _pixel(gate, at)
            for shift in itertools.product(*map(range, step)):
                fine = tuple(a * s + o for a, s, o in zip(at, step, shift, strict=True))
                total = total + torch.stack(
                    [torch.einsum("i,i->", row[(slice(None), *shift)], _pixel(x[b], fine)) for row in theta]
                )
            z[at] = torch.einsum("i,i->", psi_weight[0], total.clamp_min(0)) + psi_bias[0]
        if normalise == "softmax":
            e = torch.exp(z - z.detach().max())
            a = e / e.sum()
        else:
            a = 1 / (1 + torch.exp(-z))
        out[b, 0] = _resize(a, tuple(sizes), align_corners)
    return out


def naive_attention_gate(
    x: Tensor,
    g: Tensor,
    theta: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    psi_weight: Tensor,
    psi_bias: Tensor,
    w_weight: Tensor,
    w_bias: Tensor,
    norm: tuple[Tensor, Tensor, Tensor, Tensor],
    normalise: str = "sigmoid",
    align_corners: bool = False,
) -> Tensor:
    """The whole gate, y = BN(W (a x) + b) with W (Fl, Fl); `norm` = weight, bias, running mean, running variance."""
    a = naive_attention_map(
        x, g, theta, phi_weight, phi_bias, psi_weight, psi_bias, normalise=normalise, align_corners=align_corners
    )
    weight, bias, mean, var = norm
    out = []
    for b in range(x.shape[0]):
        z = _pointwise(a[b] * x[b], w_weight, w_bias)
        out.append(
            torch.stack([(z[c] - mean[c]) / torch.sqrt(var[c] + 1e-5) * weight[c] + bias[c] for c in range(len(z))])
        )
    return torch.stack(out)
