"""Dynamic local attention (MHDLSA): each pixel makes kernels for groups of channels."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, divides, flag, refuse, whole

PAPERS = (
    Paper(
        "DLGSANet: Lightweight Dynamic Local and Global Self-Attention Networks for Image Super-Resolution",
        "Li, Pan, Tang, Dong",
        2023,
        "2301.02031",
        "abstract; official code (dlgsanet_arch.py)",
    ),
)

CARD = Card(
    "dynamic_local",
    equation="""u = W_v x      no bias
kernels = W2 DW (W1 u)      W1 1 x 1, C to C / r;  DW depthwise, K x K;  W2 1 x 1, to K K for each group of channels
o[c, y, x] = sum_ae kernels[g(c), a, e, y, x] u[c, y + a - K // 2, x + e - K // 2]      zeros outside
y = W_o o      no bias;      no activation, norm or softmax: weights are signed, and the kernels linear in x""",
    papers=PAPERS,
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("B*Y*X*(M/reduction*(M + kernel_size**2 + kernel_size**2*M/group_channels) + kernel_size**2*M)", ""),
    claim="Kernels follow the place: a layer multiplies neighbours with each other, which no fixed kernel does, "
    "at a cost linear in pixels: tests/vision/test_dynamic_local.py::test_is_quadratic_without_biases, "
    "tests/vision/test_dynamic_local.py::test_moves_with_the_map, "
    "tests/vision/test_dynamic_local.py::test_cost_is_linear_in_pixels.",
    verified="third-party",
    example={"kernel_size": 3, "group_channels": 4},
    defaults={
        "kernel_size": "code",
        "group_channels": "code, where it goes by the name of heads",
        "reduction": "code",
        "bias": "code",
    },
)


@checked()
def dynamic_convolution(
    values: Float[Tensor, "B C Y X"], kernels: Float[Tensor, "B G taps Y X"]
) -> Float[Tensor, "B C Y X"]:
    """Cross-correlation with a kernel of its own at each pixel, for each of G groups of neighbouring channels.

    Args:
        kernels: of K x K taps, K odd, row by row; zeros stand outside of the map.

    Raises:
        ValueError: taps of no such kernel, or groups that don't divide the channels.
    """
    (_, C, Y, X), (G, taps) = values.shape, kernels.shape[1:3]
    K = math.isqrt(int(taps))  # while torch.jit traces, sizes are tensors
    if taps != K * K or K % 2 == 0:
        refuse("dynamic_convolution", "kernels", "have no odd square of taps", taps, "1, 9, 25, ...")
    if G == 0 or C % G:
        refuse("dynamic_convolution", "values", "has channels that are no multiple of groups", C, f"a multiple of {G}")
    wide = torch.promote_types(values.dtype, torch.float32)
    padded = F.pad(values, (K // 2,) * 4).unflatten(1, (G, -1))
    out = torch.zeros(*padded.shape[:3], Y, X, dtype=wide, device=values.device)
    for tap in range(K * K):  # a window at a time: laid out side by side they would be K x K times as much
        a, e = divmod(tap, K)
        out = out + kernels[:, :, tap, None] * padded[..., a : a + Y, e : e + X]
    return out.flatten(1, 2).to(values.dtype)


@CARD.module
class DynamicLocalAttention(nn.Module):
    """`dynamic_convolution` with kernels that it makes of the map.

    Args:
        dim: C.
        kernel_size: K, odd.
        group_channels: channels that share a kernel.
        reduction: r, by which there are fewer channels on the way to the kernels.
        bias: of the three maps that make kernels; the projections have none.
    """

    def __init__(
        self, dim: int, *, kernel_size: int = 7, group_channels: int = 6, reduction: int = 4, bias: bool = True
    ) -> None:
        super().__init__()
        whole(self, dim=dim, kernel_size=kernel_size, group_channels=group_channels, reduction=reduction)
        flag(self, bias=bias)
        divides(self, group_channels=group_channels, dim=dim)
        if kernel_size % 2 == 0:
            refuse(self, "kernel_size", "is even", kernel_size, "an odd int, so that a kernel has a centre")
        if reduction > dim:
            refuse(self, "reduction", "leaves no channel", reduction, f"an int from 1 to dim = {dim}")
        inner, groups = dim // reduction, dim // group_channels
        self.dim, self.kernel_size, self.groups = dim, kernel_size, groups
        self.v_proj, self.o_proj = (nn.Conv2d(dim, dim, 1, bias=False) for _ in range(2))
        self.narrow = nn.Conv2d(dim, inner, 1, bias=bias)
        self.near = nn.Conv2d(inner, inner, kernel_size, padding=kernel_size // 2, groups=inner, bias=bias)
        self.taps = nn.Conv2d(inner, kernel_size**2 * groups, 1, bias=bias)

    def _kernels(self, u: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B G taps Y X"]:
        return self.taps(self.near(self.narrow(u))).unflatten(1, (self.groups, self.kernel_size**2))

    @checked(C="dim")
    def kernels(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B G taps Y X"]:
        """What each pixel is convolved with: for each group K x K taps, row by row."""
        return self._kernels(self.v_proj(x))

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        u = self.v_proj(x)
        return self.o_proj(dynamic_convolution(u, self._kernels(u)))

    def extra_repr(self) -> str:
        return f"{self.dim}, kernel_size={self.kernel_size}, groups={self.groups}"
