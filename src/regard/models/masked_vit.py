"""A small vision transformer whose patches may be hidden as keys, wholly or partly."""

from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.checks import checked, divides, whole
from regard.masks import padding
from regard.pipeline.function import attention


def weighted_attention(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B H S D"], v: Float[Tensor, "B H S V"], weight: Float[Tensor, "B S"]
) -> Float[Tensor, "B H T V"]:
    """Softmax attention whose keys count as often as `weight` says, with its gradient, at weights of 0 too."""
    scores = (q @ k.mT * q.shape[-1] ** -0.5).to(torch.promote_types(q.dtype, torch.float32))
    visible = scores.masked_fill(weight.detach()[:, None, None] <= 0, -torch.inf)
    ahead = scores - visible.detach().amax(-1, keepdim=True)
    shares = ahead.clamp(max=30).exp() * weight[:, None, None]  # hidden keys may be far ahead: no inf times 0
    return (shares / shares.sum(-1, keepdim=True)).to(v.dtype) @ v


class MaskedAttention(nn.Module):
    """Attention between tokens, some of which are hidden as keys. Their own rows are computed, and reach nobody.

    Args:
        dim, num_heads: M and H.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads)
        divides(self, num_heads=num_heads, dim=dim)
        self.dim, self.num_heads = dim, num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(
        self,
        x: Float[Tensor, "B N M"],
        keep: Bool[Tensor, "B N"] | None = None,
        weight: Float[Tensor, "B N"] | None = None,
        bias: Float[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B N M"]:
        """`keep` is True at keys that may be seen, `weight` how often they count, `bias` is added to their scores."""
        q, k, v = (
            f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        if weight is not None:
            out = weighted_attention(q, k, v, weight)
        else:
            added = None if bias is None else bias[:, None, None]
            out = attention(q, k, v, mask=None if keep is None else padding(keep), bias=added)
        made: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return made


class MaskedBlock(nn.Module):
    """x + scale attention(LN x), then x + scale MLP(LN x), with a scale for each channel.

    Args:
        dim, num_heads, mlp_ratio: M, H, and the MLP's width over M.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attention = MaskedAttention(dim, num_heads)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.scale1, self.scale2 = (nn.Parameter(torch.ones(dim)) for _ in range(2))

    def forward(self, x: Float[Tensor, "B N M"], **hidden: Tensor | None) -> Float[Tensor, "B N M"]:
        x = x + self.scale1 * self.attention(self.norm1(x), **hidden)
        return x + self.scale2 * cast(Tensor, self.mlp(self.norm2(x)))


class MaskedViT(nn.Module):
    """Images (B, C, Y, X) to tokens: one for the class, registers, and the patches row by row.

    Args:
        dim, num_heads, depth, mlp_ratio: of the blocks.
        channels, size, patch: of the images, and of their patches.
        registers: tokens beside the class's that stand for no patch.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        channels: int,
        size: int,
        patch: int,
        depth: int,
        registers: int,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        whole(self, channels=channels, size=size, patch=patch, depth=depth)
        whole(self, 0, registers=registers)
        divides(self, patch=patch, size=size)
        self.channels, self.size, self.prefix = channels, size, 1 + registers
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.first = nn.Parameter(torch.empty(1, self.prefix, dim))
        self.places = nn.Parameter(torch.empty(1, self.prefix + (size // patch) ** 2, dim))
        self.blocks = nn.ModuleList(MaskedBlock(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for p in (self.first, self.places):
            nn.init.trunc_normal_(p, std=0.02)

    @checked(C="channels", Y="size", X="size")
    def forward(
        self, image: Float[Tensor, "B C Y X"], mask: Float[Tensor, "B P"] | None = None, *, soft: bool = False
    ) -> Float[Tensor, "B N M"]:
        """`mask` says how far each patch may be seen: as 0 or 1, or softly, as the logarithm of what it holds."""
        z = self.embed(image).flatten(2).mT
        x = torch.cat([self.first.expand(len(z), -1, -1), z], 1) + self.places
        hidden: dict[str, Tensor] = {}
        if mask is not None:
            full = torch.cat([mask.new_ones(len(mask), self.prefix), mask], 1)
            if soft:
                hidden["bias"] = (full + 1e-10).log()
            elif full.requires_grad:
                hidden["weight"] = full
            else:
                hidden["keep"] = full > 0.5
        for block in self.blocks:
            x = block(x, **hidden)
        return cast(Tensor, self.norm(x))
