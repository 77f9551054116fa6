"""Mega's norms of tokens: layer norm, and two that only divide by the root mean square."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.checks import choice

Norm = Literal["layer", "rms", "scale"]


def token_norm(norm: Norm, dim: int) -> nn.Module:
    """The norm of that name for tokens of width `dim`, with 1e-5 as the authors have it."""
    choice("Mega", get_args(Norm), norm=norm)
    if norm == "scale":
        return ScaleNorm(eps=1e-5)
    return nn.LayerNorm(dim, eps=1e-5) if norm == "layer" else nn.RMSNorm(dim, eps=1e-5)


class ScaleNorm(nn.Module):
    """Each token over its root mean square, times one number for all channels.

    Shapes: (..., M) -> the same.
    """

    def __init__(self, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, x: Float[Tensor, "... M"]) -> Float[Tensor, "... M"]:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.scale
