"""Two layers with sines, a norm of their length in between."""

import math

import torch
from jaxtyping import Float, Inexact
from torch import Tensor, nn


def scale_norm(z: Inexact[Tensor, "*b M"], weight: Float[Tensor, " M"] | float = 1.0) -> Inexact[Tensor, "*b M"]:
    """w z / (|z| + 1e-5), the norm of a complex z by moduli."""
    return weight * z / (torch.linalg.vector_norm(z, dim=-1, keepdim=True) + 1e-5)


class Siren(nn.Module):
    """sin(W2 SN(sin(W1 x + b1)) + b2)."""

    def __init__(self, dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner, self.outer, self.dropout = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Dropout(dropout)
        self.norm = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors': uniform up to sqrt(6 / M), no biases."""
        nn.init.ones_(self.norm)
        for proj in (self.inner, self.outer):
            nn.init.uniform_(proj.weight, -math.sqrt(6 / len(self.norm)), math.sqrt(6 / len(self.norm)))
            nn.init.zeros_(proj.bias)

    def forward(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        return self.outer(self.dropout(scale_norm(self.inner(x).sin(), self.norm))).sin()
