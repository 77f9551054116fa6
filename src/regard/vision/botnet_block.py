"""The bottleneck block of ResNets around bottleneck attention.

The paper, and what was read of it, stand on the card of `regard.vision.botnet`.
"""

from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.checks import checked, divides, whole
from regard.vision._shared import MapNorm
from regard.vision.botnet import BottleneckAttention, Positions


class BottleneckBlock(nn.Module):
    """ResNet's bottleneck with that attention in the place of its 3 x 3 convolution: M channels to 4 P.

    relu(shortcut + BN(W' relu(BN(attention(relu(BN(W x)))))));  the last norm starts at 0.

    Args:
        dim, num_heads: M and H; the paper's 4 heads.
        inner_dim: P; default dim / 4, so that the block keeps M.
        stride: 2 makes the map half as high and wide.
        size, positions, scale_positions: as for BottleneckAttention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        inner_dim: int | None = None,
        stride: Literal[1, 2] = 1,
        size: tuple[int, int] = (14, 14),
        positions: Positions = "relative",
        scale_positions: bool = True,
    ) -> None:
        super().__init__()
        if inner_dim is None:
            divides(self, four=4, dim=dim)
        P = dim // 4 if inner_dim is None else inner_dim
        whole(self, dim=dim, inner_dim=P)
        self.dim = dim
        self.in_proj, self.in_norm = nn.Conv2d(dim, P, 1, bias=False), MapNorm(P)
        how: dict[str, Any] = {"positions": positions, "scale_positions": scale_positions}
        self.attention = BottleneckAttention(P, num_heads, size=size, stride=stride, **how)
        self.norm = MapNorm(P)
        self.out_proj, self.out_norm = nn.Conv2d(P, 4 * P, 1, bias=False), MapNorm(4 * P)
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2 or dim != 4 * P:
            self.shortcut = nn.Sequential(nn.Conv2d(dim, 4 * P, 1, stride=stride, bias=False), MapNorm(4 * P))
        nn.init.zeros_(self.out_norm.weight)

    @checked(M="dim")
    def forward(self, x: Float[Tensor, "B M Y X"]) -> Float[Tensor, "B C y x"]:
        z = self.attention(F.relu(self.in_norm(self.in_proj(x))))
        z = self.out_norm(self.out_proj(F.relu(self.norm(z))))
        return F.relu(self.shortcut(x) + z)
