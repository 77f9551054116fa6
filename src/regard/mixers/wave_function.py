"""A wave function of spins on a periodic lattice: patches, layers of factored attention, and log cosh of their sum.

The paper, and what was read of it, stand on the card of `regard.mixers.factored`.
"""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from regard.checks import checked, divides, whole
from regard.mixers.factored import FactoredAttention, Normalize


def patches(spins: Float[Tensor, "B N"], size: tuple[int, int], patch: tuple[int, int]) -> Float[Tensor, "B n P"]:
    """A lattice row by row, (B, Y X), cut into patches row by row, each of which is row by row."""
    (Y, X), (y, x) = size, patch
    return spins.reshape(-1, Y // y, y, X // x, x).transpose(2, 3).flatten(3).flatten(1, 2)


def log_cosh(z: Complex[Tensor, "*n"]) -> Complex[Tensor, "*n"]:
    """log cosh z without overflow, for z of any size."""
    z = torch.where(z.real < 0, -z, z)
    return z + torch.log1p(torch.exp(-2 * z)) - math.log(2)


class Block(nn.Module):
    """x + attention(LN x), then x + MLP(LN x), four times as wide within."""

    def __init__(self, dim: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim, eps=1e-6), attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))

    def forward(self, x: Float[Tensor, "B n M"]) -> Float[Tensor, "B n M"]:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class WaveFunction(nn.Module):
    """log psi of spin configurations, whose parameters are real and whose values are complex.

    Defaults are those of the authors' code for 100 spins. No position is added anywhere: the table of attention knows
    them. With `translation_invariant` a shift by a whole patch changes nothing; one by less does.

    Args:
        size: (Y, X) of the lattice; (1, X) is a ring.
        patch: (y, x) of a patch; they divide the lattice.
        dim, num_heads, depth: M, H and how many blocks.
        translation_invariant, normalizer: as of `FactoredAttention`.
    """

    def __init__(
        self,
        size: tuple[int, int] = (10, 10),
        patch: tuple[int, int] = (2, 2),
        *,
        dim: int = 60,
        num_heads: int = 10,
        depth: int = 4,
        translation_invariant: bool = True,
        normalizer: Normalize | None = None,
    ) -> None:
        super().__init__()
        whole(self, Y=size[0], X=size[1], patch_y=patch[0], patch_x=patch[1], dim=dim, depth=depth)
        divides(self, patch_y=patch[0], Y=size[0])
        divides(self, patch_x=patch[1], X=size[1])
        self.size, self.patch, self.num_spins = size, patch, math.prod(size)
        grid = (size[0] // patch[0], size[1] // patch[1])
        self.embed = nn.Linear(math.prod(patch), dim)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                FactoredAttention(
                    dim, num_heads, grid=grid, translation_invariant=translation_invariant, normalizer=normalizer
                ),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.real_proj, self.imag_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.real_norm, self.imag_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot uniform and zero biases, as the authors' code; norms start at 1 and 0."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    @checked(N="num_spins")
    def forward(self, spins: Float[Tensor, "B N"]) -> Complex[Tensor, " B"]:
        """log psi; spins are -1 and 1, the lattice row by row."""
        x = self.embed(patches(spins, self.size, self.patch))
        for block in self.blocks:
            x = block(x)
        z = self.norm(x.sum(1))
        out = torch.complex(self.real_norm(self.real_proj(z)), self.imag_norm(self.imag_proj(z)))
        return log_cosh(out).sum(-1)
