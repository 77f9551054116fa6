"""Attention in attention (A2N): each sample says how much a gated and a plain branch count."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, number, refuse, whole
from regard.vision.pixel_attention import KINKS, PixelAttentionConv, pixel_attention_network
from regard.vision.super_resolution import SuperResolution

CARD = Card(
    "attention_in_attention",
    equation="""h = l(P1 x)      l = LeakyReLU      P1, P2 1 x 1, no bias
a = softmax(W2 ReLU(W1 mean_yx(h)) / tau)      two numbers for each sample, no biases
A = K4 ((K3 h) * sigmoid(K2 l(K1 h) + b))      N = K5 h      K1, K3, K4 3 x 3, K5 3 x 3 or 1 x 1, no bias
y = x + P2 l(a_0 A + a_1 N)""",
    papers=(
        Paper(
            "Attention in Attention Network for Image Super-Resolution",
            "Chen, Gu, Zhang",
            2021,
            "2104.09497",
            "abstract; official code (aan.py)",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("B*Y*X*M**2*(30 + plain_kernel**2) + B*M*(M + 2)/reduction", ""),
    claim="Two weights follow the sample, for C^2 / r + 2 C / r parameters more; without them it is the mean of both "
    "branches: tests/vision/test_attention_in_attention.py::test_the_weights_follow_the_sample, "
    "tests/vision/test_attention_in_attention.py::test_without_a_say_both_branches_count_alike.",
    differs=(
        "`branch_weights` tells how much each branch counts, which the paper shows as a figure.",
        "At the code's temperature of 30, which nothing lowers, the weights start within a hundredth of 1/2, and stay "
        "there until the logits have grown much.",
    ),
    verified="third-party",
    exceptions={"L51 gradients_are_slopes": KINKS},
    example={"temperature": 1.0},
    defaults={
        "reduction": "code",
        "temperature": "code",
        "plain_kernel": "code, A2N; 1 is A2N-M",
        "slope": "code",
    },
)


def blended(
    attended: Float[Tensor, "B C Y X"], plain: Float[Tensor, "B C Y X"], weights: Float[Tensor, "B 2"]
) -> Float[Tensor, "B C Y X"]:
    """a_0 A + a_1 N, of each sample."""
    first, second = weights.to(attended.dtype)[..., None, None, None].unbind(1)
    return first * attended + second * plain


@CARD.module
class AttentionInAttention(nn.Module):
    """The block, residual inside.

    Args:
        dim: C.
        reduction: of the channels between W1 and W2.
        temperature: tau, which divides the logits of the two weights.
        plain_kernel: of the branch without attention.
        slope: of the LeakyReLUs.
    """

    def __init__(
        self,
        dim: int,
        *,
        reduction: int = 4,
        temperature: float = 30.0,
        plain_kernel: Literal[1, 3] = 3,
        slope: float = 0.2,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, reduction=reduction)
        number(self, above=0, temperature=temperature)
        choice(self, (1, 3), plain_kernel=plain_kernel)
        number(self, least=0, slope=slope)
        if reduction > dim:
            refuse(self, "reduction", "leaves no channel", reduction, f"an int from 1 to dim = {dim}")
        self.dim, self.temperature, self.slope = dim, temperature, slope
        self.first, self.last = (nn.Conv2d(dim, dim, 1, bias=False) for _ in range(2))
        self.squeeze = nn.Linear(dim, dim // reduction, bias=False)
        self.choose = nn.Linear(dim // reduction, 2, bias=False)
        self.attention = PixelAttentionConv(dim, slope=slope)
        self.plain = nn.Conv2d(dim, dim, plain_kernel, padding=plain_kernel // 2, bias=False)

    def _weights(self, h: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B 2"]:
        logits = self.choose(F.relu(self.squeeze(h.mean((2, 3)))))
        return (logits / self.temperature).softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    @checked(C="dim")
    def branch_weights(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B 2"]:
        """How much the branch with attention counts, and the one without; they sum to 1."""
        return self._weights(F.leaky_relu(self.first(x), self.slope))

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        h = F.leaky_relu(self.first(x), self.slope)
        both = blended(self.attention(h), self.plain(h), self._weights(h))
        return x + self.last(F.leaky_relu(both, self.slope))

    def extra_repr(self) -> str:
        return f"{self.dim}, temperature={self.temperature}"


def a2n(
    *,
    dim: int = 40,
    up_dim: int = 24,
    blocks: int = 16,
    scale: int = 4,
    channels: int = 3,
    plain_kernel: Literal[1, 3] = 3,
) -> SuperResolution:
    """A2N in the sizes of its authors; A2N-M with a plain kernel of 1.

    Args:
        dim, up_dim: channels of the maps before and after they are enlarged.
        blocks: how many.
        scale: 2, 3 or 4.
        channels: of the images.
        plain_kernel: as for `AttentionInAttention`.
    """
    made: list[nn.Module] = [AttentionInAttention(dim, plain_kernel=plain_kernel) for _ in range(blocks)]
    return pixel_attention_network(made, dim=dim, up_dim=up_dim, scale=scale, channels=channels)
