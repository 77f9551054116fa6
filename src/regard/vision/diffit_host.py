"""A small DiffiT: the latent model around time-dependent attention.

The paper, and what was read of it, stand on the card of `regard.vision.time_dependent`.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.checks import checked, divides, refuse, whole
from regard.vision.maps import to_tokens
from regard.vision.time_dependent import TimeDependentAttention


class DiffiTBlock(nn.Module):
    """x + attention(LN x, time), then x + MLP(LN x); the norms have no parameters, and time enters nowhere else.

    Args:
        dim, num_heads, window, time_dim: as of the attention.
        mlp_ratio: the MLP's width over M.
    """

    def __init__(
        self, dim: int, num_heads: int, *, window: int = 8, time_dim: int | None = None, mlp_ratio: float = 4.0
    ) -> None:
        super().__init__()
        self.dim = dim
        self.attention = TimeDependentAttention(dim, num_heads, window=window, time_dim=time_dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.up, self.down = nn.Linear(dim, int(dim * mlp_ratio)), nn.Linear(int(dim * mlp_ratio), dim)
        _glorot(self.up, self.down)

    @checked(M="dim")
    def forward(self, x: Float[Tensor, "B N M"], time: Float[Tensor, "B Mt"]) -> Float[Tensor, "B N M"]:
        x = x + self.attention(self.norm(x), time)
        return x + self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))


def time_features(t: Float[Tensor, " B"], dim: int = 256, period: float = 10000.0) -> Float[Tensor, "B {dim}"]:
    """Cosines, then sines, of frequencies from 1 down to nearly 1 / period; an odd width ends with a 0."""
    half = dim // 2
    angle = t[:, None] * torch.exp(-math.log(period) * torch.arange(half, device=t.device, dtype=t.dtype) / half)
    return F.pad(torch.cat([angle.cos(), angle.sin()], -1), (0, dim % 2))


def grid_features(dim: int, tall: int, wide: int, period: float = 10000.0) -> Float[Tensor, "N {dim}"]:
    """Of each place of a grid: sines, then cosines, of its column in the first half, and of its row in the second."""
    divides("grid_features", quarters=4, dim=dim)
    frequency = period ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    at_row, at_column = (
        torch.cat([angle.sin(), angle.cos()], -1)
        for angle in (torch.arange(n, dtype=torch.float64)[:, None] * frequency for n in (tall, wide))
    )
    parts = [at_column[None].expand(tall, -1, -1), at_row[:, None].expand(-1, wide, -1)]
    return torch.cat(parts, -1).flatten(0, 1)


class DiffiT(nn.Module):
    """Noisy latents (B, C, Y, X), times and classes to what they were: (B, outputs, Y, X). Starts at 0.

    Args:
        channels, outputs: of the latents and of the answer.
        dim, num_heads, depth: M, H, how many blocks.
        size, patch: sides of the latents, and of the patches that become tokens.
        classes: how many there are; one more row of the table stands for no class, and is what -1 reads.
    """

    places: Tensor

    def __init__(
        self,
        channels: int,
        outputs: int,
        dim: int,
        num_heads: int,
        *,
        depth: int = 2,
        size: int = 8,
        patch: int = 2,
        classes: int = 0,
    ) -> None:
        super().__init__()
        whole(self, channels=channels, outputs=outputs, depth=depth, size=size, patch=patch)
        whole(self, 0, classes=classes)
        divides(self, patch=patch, size=size)
        grid = size // patch
        self.channels, self.outputs, self.size, self.patch, self.classes = channels, outputs, size, patch, classes
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.register_buffer("places", grid_features(dim, grid, grid).to(torch.get_default_dtype()), persistent=False)
        self.time_in, self.time_out = nn.Linear(256, dim), nn.Linear(dim, dim)
        self.labels = nn.Embedding(classes + 1, dim)
        self.blocks = nn.ModuleList(DiffiTBlock(dim, num_heads, window=grid) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.out = nn.Linear(dim, patch * patch * outputs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors: normal of 0.02 for times and classes, 0 for the last layer, Glorot uniform patches."""
        nn.init.xavier_uniform_(self.embed.weight.flatten(1))
        for linear in (self.time_in, self.time_out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.labels.weight, std=0.02)
        for p in (self.embed.bias, self.out.weight, self.out.bias):
            if p is not None:
                nn.init.zeros_(p)

    def time(self, t: Float[Tensor, " B"], labels: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B M"]:
        """The vector that blocks add: of the time and of the class."""
        labels = torch.full_like(t, -1, dtype=torch.long) if labels is None else labels
        features = time_features(t).to(self.time_in.weight.dtype)
        return torch.add(self.time_out(F.silu(self.time_in(features))), self.labels(labels % (self.classes + 1)))

    @checked(C="channels")
    def forward(
        self, x: Float[Tensor, "B C Y X"], t: Float[Tensor, " B"], labels: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B O Y X"]:
        if x.shape[2:] != (self.size, self.size):
            refuse(self, "x", "has other sides than its places", tuple(x.shape[2:]), f"{self.size} x {self.size}")
        z, time = to_tokens(self.embed(x)) + self.places, self.time(t, labels)
        for block in self.blocks:
            z = block(z, time)
        z = self.out(F.silu(self.norm(z)))
        grid, p = self.size // self.patch, self.patch
        return (
            z.view(len(z), grid, grid, p, p, self.outputs)
            .permute(0, 5, 1, 3, 2, 4)
            .reshape(len(z), self.outputs, self.size, self.size)
        )


def _glorot(*linears: nn.Linear) -> None:
    for linear in linears:
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
