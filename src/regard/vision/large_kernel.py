"""Large kernel attention: a map from a decomposed large convolution, multiplied onto the features.

No softmax and no sigmoid: A may be negative or large. VAN's attention layer is x + P2(LKA(GELU(P1 x))).
"""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, refuse, whole

CARD = Card(
    "large_kernel",
    equation="""A = Conv1x1( DW_far( DW_near(x) ) )      LKA(x) = A * x
DW_near: depthwise, (2d - 1) x (2d - 1);  DW_far: depthwise, ceil(K / d) x ceil(K / d) with dilation d""",
    papers=(
        Paper("Visual Attention Network", "Guo, Lu, Liu, Cheng, Hu", 2022, "2202.09741", "abstract; official code"),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("B*Y*X*M*((2*dilation - 1)**2 + ceil(kernel/dilation)**2 + M)", ""),
    claim="Linear in pixels, with the reach of a large kernel: "
    "tests/vision/test_large_kernel.py::test_cost_is_linear_in_pixels, "
    "tests/vision/test_large_kernel.py::test_reach_is_that_of_a_large_kernel.",
    verified="third-party",
    example={"kernel": 5, "dilation": 2},
    defaults={"kernel": "paper", "dilation": "paper"},
)

Weights = tuple[Tensor, Tensor]
"""Weight and bias of a convolution."""


def large_kernel_attention(
    x: Float[Tensor, "B C Y X"], near: Weights, far: Weights, mix: Weights, *, dilation: int = 3
) -> Float[Tensor, "B C Y X"]:
    """A * x. `near` and `far` are depthwise (C, 1, k, k), odd k; `mix` is (C, C, 1, 1)."""
    C = x.shape[1]
    a = F.conv2d(x, *near, padding=near[0].shape[-1] // 2, groups=C)
    a = F.conv2d(a, *far, padding=far[0].shape[-1] // 2 * dilation, dilation=dilation, groups=C)
    return F.conv2d(a, *mix) * x


@CARD.module
class LargeKernelAttention(nn.Module):
    """`large_kernel_attention` with its three convolutions.

    Args:
        dim: C.
        kernel: K, the width of the convolution that is taken apart; the paper's is 21. A pixel reaches 11 others on
            each side then.
        dilation: d; the paper's is 3.
    """

    def __init__(self, dim: int, *, kernel: int = 21, dilation: int = 3) -> None:
        super().__init__()
        whole(self, dim=dim, dilation=dilation)
        whole(self, dilation, kernel=kernel)
        size, far = 2 * dilation - 1, -(-kernel // dilation)
        if far % 2 == 0:
            got = f"{kernel}, with dilation {dilation} a far convolution of {far}"
            refuse(self, "kernel", "gives an even far convolution", got, "an odd one, which has a centre")
        self.dim, self.dilation = dim, dilation
        self.near = nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim)
        self.far = nn.Conv2d(dim, dim, far, padding=far // 2 * dilation, dilation=dilation, groups=dim)
        self.mix = nn.Conv2d(dim, dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors: normal with variance 2 / (outputs that an input of the convolution reaches); no bias."""
        for conv in (self.near, self.far, self.mix):
            _reset(conv)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        convs = ((c.weight, c.bias) for c in (self.near, self.far, self.mix))
        return large_kernel_attention(x, *convs, dilation=self.dilation)  # type: ignore[arg-type]


class VANAttention(nn.Module):
    """VAN's layer around it: x + P2(LKA(GELU(P1 x))). Arguments as for LargeKernelAttention."""

    def __init__(self, dim: int, *, kernel: int = 21, dilation: int = 3) -> None:
        super().__init__()
        self.dim = dim
        self.in_proj = nn.Conv2d(dim, dim, 1)
        self.attention = LargeKernelAttention(dim, kernel=kernel, dilation=dilation)
        self.out_proj = nn.Conv2d(dim, dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for conv in (self.in_proj, self.out_proj):
            _reset(conv)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        return x + self.out_proj(self.attention(F.gelu(self.in_proj(x))))


def _reset(conv: nn.Conv2d) -> None:
    fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
    nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
