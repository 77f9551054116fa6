"""SRFormer's block around permuted self-attention, and the network: a feed-forward that convolves its hidden channels.

x = x + PSA(norm x),   x = x + FFN(norm x),      FFN z = W2 (h + gelu(DW h)),   h = gelu(W1 z),   DW depthwise, 5 x 5
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.checks import checked, choice, number, refuse, whole
from regard.vision.permuted_window import PermutedSelfAttention
from regard.vision.super_resolution import RGB_MEAN, DropPath, MapNorm, PixelShuffle, ResidualGroup, SuperResolution

Upsampler = Literal["one_step", "steps"]


class ConvFeedForward(nn.Module):
    """W2 (h + gelu(DW h)) with h = gelu(W1 z).

    Args:
        dim, hidden: channels outside and of h.
        kernel_size: of DW, odd.
        dropout: before and after W2.
    """

    def __init__(self, dim: int, hidden: int, *, kernel_size: int = 5, dropout: float = 0.0) -> None:
        super().__init__()
        whole(self, dim=dim, hidden=hidden, kernel_size=kernel_size)
        number(self, least=0, below=1, dropout=dropout)
        if kernel_size % 2 == 0:
            refuse(self, "kernel_size", "is even", kernel_size, "an odd int, so that a kernel has a centre")
        self.up, self.down = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)
        self.near = nn.Conv2d(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of 0.02 for W1 and W2, and no bias; the convolution as torch's."""
        for linear in (self.up, self.down):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]

    def forward(self, z: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        h = F.gelu(self.up(z))
        return self.dropout(self.down(self.dropout(h + F.gelu(self.near(h)))))


class SRFormerBlock(nn.Module):
    """Permuted self-attention and the feed-forward, each on what is normalised, and added.

    Args:
        dim, num_heads, window, shift, reduction: as for `PermutedSelfAttention`.
        mlp_ratio: of hidden channels to `dim`.
        dropout: of weights and outputs, and in the feed-forward.
        drop_path: with which probability training leaves a branch out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 24,
        shift: int = 0,
        reduction: int = 2,
        mlp_ratio: int = 2,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        whole(self, mlp_ratio=mlp_ratio)
        self.dim = dim
        self.norms = nn.ModuleList(MapNorm(dim) for _ in range(2))
        self.attention = PermutedSelfAttention(
            dim, num_heads, window=window, shift=shift, reduction=reduction, dropout=dropout
        )
        self.feed_forward = ConvFeedForward(dim, mlp_ratio * dim, dropout=dropout)
        self.drop_path = DropPath(drop_path)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        for norm, branch in zip(self.norms, (self.attention, self.feed_forward), strict=True):
            x = x + self.drop_path(branch(norm(x)))
        return x


def srformer(
    *,
    dim: int = 60,
    num_heads: int = 6,
    window: int = 16,
    depths: Sequence[int] = (6, 6, 6, 6),
    mlp_ratio: int = 2,
    scale: int = 4,
    channels: int = 3,
    span: float = 1.0,
    upsampler: Upsampler = "one_step",
    drop_path: float = 0.1,
) -> SuperResolution:
    """SRFormer; by default the light one, of which the large one has dim 180, window 24, six groups and "steps".

    Args:
        dim, num_heads, window, mlp_ratio: as for `SRFormerBlock`; every other block is shifted by half a window.
        depths: blocks of each group.
        scale: of the enlargement.
        channels: of the images.
        span: what images are multiplied by inside.
        upsampler: one convolution before the pixels are shuffled, or 64 channels, and a factor at a time.
        drop_path: of the last block; from 0 on it grows block by block.
    """
    choice("srformer", get_args(Upsampler), upsampler=upsampler)
    rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())
    groups = [
        ResidualGroup(
            dim,
            [
                SRFormerBlock(
                    dim,
                    num_heads,
                    window=window,
                    shift=window // 2 * (n % 2),
                    mlp_ratio=mlp_ratio,
                    drop_path=next(rates),
                )
                for n in range(depth)
            ],
        )
        for depth in depths
    ]
    return SuperResolution(
        nn.Sequential(MapNorm(dim), *groups, MapNorm(dim)),
        PixelShuffle(dim, channels=channels, scale=scale, hidden=None if upsampler == "one_step" else 64),
        dim=dim,
        channels=channels,
        scale=scale,
        mean=RGB_MEAN if channels == 3 else None,
        span=span,
        multiple=window,
    )
