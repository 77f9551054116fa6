"""DLGSANet's block and network: dynamic local attention and sparse channel attention in turn, a gated MLP after each.

x = x + local(norm x),   x = x + MLP(norm x),   x = x + sparse(norm x),   x = x + MLP(norm x)
MLP z = W2 (gelu(a) * b),   [a | b] = DW3x3(W1 z),   no biases
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.checks import checked, whole
from regard.vision.dynamic_local import DynamicLocalAttention
from regard.vision.sparse_channel import SparseChannelAttention
from regard.vision.super_resolution import RGB_MEAN, MapNorm, PixelShuffle, ResidualGroup, SuperResolution


class GatedConvFeedForward(nn.Module):
    """W2 (gelu(a) * b), with a and b of a depthwise convolution.

    Args:
        dim, hidden: channels outside, and of a and b each.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        whole(self, dim=dim, hidden=hidden)
        self.up, self.down = nn.Conv2d(dim, 2 * hidden, 1, bias=False), nn.Conv2d(hidden, dim, 1, bias=False)
        self.near = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)

    def forward(self, z: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        gate, value = self.near(self.up(z)).chunk(2, 1)
        return self.down(F.gelu(gate) * value)


class HybridDynamicBlock(nn.Module):
    """The block (HDTB).

    Args:
        dim, num_heads, tile: as for `SparseChannelAttention`.
        kernel_size, group_channels: as for `DynamicLocalAttention`.
        mlp_ratio: of hidden channels to `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 6,
        *,
        kernel_size: int = 7,
        group_channels: int = 6,
        mlp_ratio: int = 2,
        tile: int | None = None,
    ) -> None:
        super().__init__()
        whole(self, mlp_ratio=mlp_ratio)
        self.dim = dim
        self.norms = nn.ModuleList(MapNorm(dim) for _ in range(4))
        self.branches = nn.ModuleList(
            (
                DynamicLocalAttention(dim, kernel_size=kernel_size, group_channels=group_channels),
                GatedConvFeedForward(dim, mlp_ratio * dim),
                SparseChannelAttention(dim, num_heads, tile=tile),
                GatedConvFeedForward(dim, mlp_ratio * dim),
            )
        )

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        for norm, branch in zip(self.norms, self.branches, strict=True):
            x = x + branch(norm(x))
        return x


def dlgsanet(
    *,
    dim: int = 60,
    num_heads: int = 6,
    groups: int = 4,
    blocks: int = 3,
    kernel_size: int = 7,
    group_channels: int = 6,
    mlp_ratio: int = 2,
    tile: int | None = None,
    scale: int = 4,
    channels: int = 3,
) -> SuperResolution:
    """DLGSANet, in the sizes that its code has as defaults.

    Args:
        dim, num_heads, kernel_size, group_channels, mlp_ratio, tile: as for `HybridDynamicBlock`.
        groups, blocks: how many groups, and blocks of each.
        scale: of the enlargement.
        channels: of the images.
    """

    def group() -> ResidualGroup:
        told = {"kernel_size": kernel_size, "group_channels": group_channels, "mlp_ratio": mlp_ratio}
        return ResidualGroup(dim, [HybridDynamicBlock(dim, num_heads, tile=tile, **told) for _ in range(blocks)])

    return SuperResolution(
        nn.Sequential(*(group() for _ in range(groups))),
        PixelShuffle(dim, channels=channels, scale=scale),
        dim=dim,
        channels=channels,
        scale=scale,
        mean=RGB_MEAN if channels == 3 else None,
        first_bias=False,
    )
