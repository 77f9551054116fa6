"""Kernels that a small network of sines makes out of coordinates (HyperZZW's slow network), and its norms.

p in [-1, 1]^n on a grid, rows first:   h_0 = sin(F_0 p),   h_i = sin(F_i p) * (L_i h_{i-1}) + beta,   W = L_out h_L
with a context c on the same grid:      h_i <- (stopgrad(h_i) + 0.1 h_i / |h_i|) * (M_i c),   |.| over the grid
"""

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.checks import number, refuse, whole
from regard.mixers.exponential import work_dtype
from regard.tracing import as_it_is


def standardised(x: Float[Tensor, "B C Y X"], dims: tuple[int, ...] = (2, 3)) -> Float[Tensor, "B C Y X"]:
    """Mean 0 and variance 1 over these axes, without weights; by default of each map by itself."""
    wide = x.to(work_dtype(x))
    wide = wide - wide.mean(dims, keepdim=True)
    return (wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + 1e-5)).to(x.dtype)


def linear_start(proj: nn.Linear | nn.Conv2d, bias: float = 0.0) -> None:
    """Weights with the variance 1 / inputs, uniform; the bias is `bias`."""
    nn.init.kaiming_uniform_(proj.weight, nonlinearity="linear")
    if proj.bias is not None:
        nn.init.constant_(proj.bias, bias)


class CoordinateKernel(nn.Module):
    """The network; without arguments it gives W (out_channels, *sizes).

    Args:
        out_channels: how many kernels.
        sizes: of the grid, one or two.
        hidden: channels of h.
        layers: L.
        frequency: omega_0, which the F's weights are multiplied by at the start.
        context: whether a context is multiplied in.
    """

    def __init__(
        self,
        out_channels: int,
        sizes: tuple[int, ...],
        *,
        hidden: int = 64,
        layers: int = 2,
        frequency: float = 1.0,
        context: bool = False,
    ) -> None:
        super().__init__()
        whole(self, out_channels=out_channels, hidden=hidden, layers=layers)
        whole(self, **{f"sizes[{n}]": size for n, size in enumerate(sizes)})
        if len(sizes) not in (1, 2):
            refuse(self, "sizes", "are neither one nor two", sizes, "(C,) or (Y, X)")
        number(self, above=0, frequency=frequency)
        self.sizes, self.frequency = tuple(sizes), frequency
        self.filters = nn.ModuleList(nn.Linear(len(sizes), hidden) for _ in range(layers + 1))
        self.mixes = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.contexts = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers if context else 0))
        self.out = nn.Linear(hidden, out_channels)
        self.beta = nn.Parameter(torch.empty(sizes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors': frequencies of a gamma distribution, the narrower the deeper; beta 0."""
        for layer, sines in enumerate(cast(Iterable[nn.Linear], self.filters)):
            sines.reset_parameters()
            shape = torch.full(sines.weight.shape, 6.0 / (layer + 1), device="cpu")
            with torch.no_grad():
                sines.weight.mul_(2 * math.pi * self.frequency * torch._standard_gamma(shape).to(sines.weight))
            nn.init.zeros_(sines.bias)
        for proj in (*self.mixes, *self.contexts):
            linear_start(proj, 1.0)
        linear_start(self.out)
        nn.init.zeros_(self.beta)
        with torch.no_grad():
            self.out.weight.div_(math.sqrt(math.prod(self.sizes)))

    def forward(
        self, context: Float[Tensor, "P hidden"] | None = None, sizes: tuple[int, ...] | None = None
    ) -> Float[Tensor, "O ..."]:
        """W. On a grid of other `sizes` beta is interpolated."""
        beta, sizes = self.beta.to(work_dtype(self.beta)), self.sizes if sizes is None else tuple(sizes)
        with as_it_is(beta.device):  # sines of high frequencies
            if sizes != self.sizes:
                mode = "linear" if len(sizes) == 1 else "bilinear"
                beta = F.interpolate(beta[None, None], sizes, mode=mode, align_corners=True)[0, 0]
            axes = [torch.linspace(-1, 1, size, device=beta.device, dtype=beta.dtype) for size in sizes]
            points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
            h = _wide(self.filters[0], points).sin()
            for i, mix in enumerate(self.mixes):
                h = _wide(self.filters[i + 1], points).sin() * _wide(mix, h) + beta.flatten()[:, None]
                if context is not None:
                    h = h.detach() + 0.1 * F.normalize(h, dim=0)
                    h = h * _wide(self.contexts[i], context.to(h.dtype))
            return _wide(self.out, h).mT.unflatten(1, sizes)


def _wide(proj: Any, x: Tensor) -> Tensor:
    return F.linear(x, proj.weight.to(x.dtype), proj.bias.to(x.dtype))
