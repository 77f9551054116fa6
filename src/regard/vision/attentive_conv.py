"""Attentive convolution: each picture makes its own small kernel a channel, whose taps compete."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, flag, refuse, whole

CARD = Card(
    "attentive_conv",
    equation="""s_i = mean of (W_k x) over the i-th of K x K cells, which cut the row of all places       (B, C, K K)
g = W_g gelu(s) + b_g                 along the taps, the same for all channels
w = g - sigmoid(d_c) mean(g)          lateral inhibition; d: a number a channel, 0 at first
y = W_o (sum_ij w[b, c, i, j] (W_v x)[b, c, y + i - r, x + j - r])       r = K // 2, zeros outside""",
    papers=(
        Paper(
            "Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency",
            "Yu et al.",
            2025,
            "2510.20092",
            "abstract; official code (models/AttNet.py)",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "padding", "compile"},
    cost=Cost("B*Y*X*M*kernel_size**2 + B*M*kernel_size**4", ""),
    claim="A kernel follows a property of the whole picture, which no fixed kernel can; one that is wholly inhibited "
    "answers to differences alone: "
    "tests/vision/test_attentive_conv.py::test_the_whole_picture_sets_the_sign_of_a_filter, "
    "tests/vision/test_attentive_conv.py::test_full_inhibition_leaves_differences.",
    differs=(
        "Masks are ours: hidden places are left out of the means and are 0 for the convolution.",
        'pool="grid" is ours, for whoever reads K x K cells as cells of the picture; the code cuts its places row by '
        "row, so that cells are bands.",
        "Left out: norms, layer scale and gated feed-forward of the block around it, and the network of such blocks.",
    ),
    verified="third-party",
    defaults={
        "kernel_size": "code",
        "activation": "code, AttNet; the diffusion models have gelu_tanh",
        "pool": "code",
        "bias": "code",
    },
)

Activation = Literal["gelu", "gelu_tanh"]
Pool = Literal["raster", "grid"]


@checked()
def attentive_convolution(
    values: Float[Tensor, "B C Y X"], kernels: Float[Tensor, "B C K K"]
) -> Float[Tensor, "B C Y X"]:
    """Cross-correlation with a kernel for each sample and channel, zeros outside; linear in both.

    Raises:
        ValueError: other shapes, or an even K.
    """
    (B, C, Y, X), K = values.shape, kernels.shape[-1]
    if K % 2 == 0:
        refuse("attentive_convolution", "kernels", "are of even size", K, "an odd one, which has a centre")
    if values.numel() == 0:
        return values * 1
    out = F.conv2d(values.reshape(1, B * C, Y, X), kernels.reshape(B * C, 1, K, K), padding=K // 2, groups=B * C)
    return out.reshape(B, C, Y, X)


def cell_means(
    a: Float[Tensor, "B C Y X"], size: int, *, pool: Pool = "raster", keep: Bool[Tensor, "B Y X"] | None = None
) -> Float[Tensor, "B C K"]:
    """Means of K = size^2 cells, which overlap where K doesn't divide the places; 0 for a cell without real ones."""
    if keep is not None:  # both means have one count, which cancels
        shown = cell_means(keep[:, None].to(a.dtype), size, pool=pool)
        sums = cell_means(a.masked_fill(~keep[:, None], 0), size, pool=pool)
        return sums / torch.where(shown == 0, 1.0, shown)
    if pool == "grid":
        return F.adaptive_avg_pool2d(a, (size, size)).flatten(2)
    return F.adaptive_avg_pool1d(a.flatten(2), size * size)


def generate_kernels(
    context: Float[Tensor, "B C Y X"],
    mix: tuple[Float[Tensor, "K K"], Float[Tensor, " K"] | None],
    inhibition: Float[Tensor, " C"],
    size: int,
    *,
    activation: Activation = "gelu",
    pool: Pool = "raster",
    keep: Bool[Tensor, "B Y X"] | None = None,
) -> Float[Tensor, "B C k k"]:
    """The kernels w of the card, of W_k x, of W_g (K = k k taps of size k) and b_g, and of d."""
    s = cell_means(context, size, pool=pool, keep=keep)
    g = F.linear(F.gelu(s, approximate="none" if activation == "gelu" else "tanh"), *mix)
    g = g - torch.sigmoid(inhibition)[:, None] * g.mean(-1, keepdim=True)
    return g.unflatten(-1, (size, size))


@CARD.module
class AttentiveConv(nn.Module):
    """`attentive_convolution` with kernels that it makes of the picture.

    Args:
        dim: C.
        kernel_size: odd.
        activation: "gelu", the exact one, or "gelu_tanh".
        pool: "raster" cuts the row of all places, one line of the picture after the other, in K x K runs; "grid" cuts
            the picture in K x K cells.
        bias: whether the projections and the map of the taps have one.

    Shapes: x (B, C, Y, X) -> (B, C, Y, X).
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int = 3,
        activation: Activation = "gelu",
        pool: Pool = "raster",
        bias: bool = True,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, kernel_size=kernel_size)
        choice(self, get_args(Activation), activation=activation)
        choice(self, get_args(Pool), pool=pool)
        flag(self, bias=bias)
        if kernel_size % 2 == 0:
            refuse(self, "kernel_size", "is even", kernel_size, "an odd int, so that a kernel has a centre")
        self.dim, self.kernel_size = dim, kernel_size
        self.activation: Activation = activation
        self.pool: Pool = pool
        self.k_proj, self.v_proj, self.o_proj = (nn.Conv2d(dim, dim, 1, bias=bias) for _ in range(3))
        self.taps = nn.Linear(kernel_size**2, kernel_size**2, bias=bias)
        self.inhibition = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors: normal with deviation 0.02, biases 0; half of a kernel's mean is taken away at first."""
        for layer in (self.k_proj, self.v_proj, self.o_proj, self.taps):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.inhibition)

    @checked(C="dim")
    def kernels(
        self, x: Float[Tensor, "B C Y X"], *, mask: Bool[Tensor, "B Y X"] | None = None
    ) -> Float[Tensor, "B C K K"]:
        """The weights that `forward` convolves with, one kernel for each sample and channel."""
        if x.shape[2] * x.shape[3] == 0:
            refuse(self, "x", "has no places", tuple(x.shape), "a map of at least 1 x 1")
        x = x if mask is None else x.masked_fill(~mask[:, None], 0)
        how: dict[str, Any] = {"activation": self.activation, "pool": self.pool, "keep": mask}
        mix = self.taps.weight, self.taps.bias
        return generate_kernels(self.k_proj(x), mix, self.inhibition, self.kernel_size, **how)

    @checked(C="dim")
    def forward(
        self, x: Float[Tensor, "B C Y X"], *, mask: Bool[Tensor, "B Y X"] | None = None
    ) -> Float[Tensor, "B C Y X"]:
        """Convolve x. `mask`: True = a real place; what stands in others changes nothing."""
        kernels = self.kernels(x, mask=mask)
        values = self.v_proj(x if mask is None else x.masked_fill(~mask[:, None], 0))
        values = values if mask is None else values.masked_fill(~mask[:, None], 0)
        return self.o_proj(attentive_convolution(values, kernels))

    def extra_repr(self) -> str:
        return f"{self.dim}, kernel_size={self.kernel_size}, activation={self.activation!r}, pool={self.pool!r}"
