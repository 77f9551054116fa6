"""CBAM: a gate for each channel, then one for each place, both made of means and maxima.

The places' gate looks at what the channels' gate has let through.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, number, refuse, whole
from regard.vision.gating import Bottleneck, MapGate, batch_normed, inner_width, means

CARD = Card(
    "cbam",
    equation="""f(s) = W2 relu(W1 s)                                  W1 (R, C)
x' = x sigmoid(f(mean over places) + f(max over places))
y  = x' sigmoid(BN(conv_kxk([mean over channels of x' ; max over channels of x'])))""",
    papers=(
        Paper(
            "CBAM: Convolutional Block Attention Module",
            "Woo, Park, Lee, Kweon",
            2018,
            "1807.06521",
            "official and third-party code; not the paper's body",
        ),
        Paper(
            "CNNtention: Can CNNs do better with Attention?",
            "Kapila, Glattki, Rathi",
            2024,
            "2412.11657",
            "abstract; summaries",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("4*B*M*inner_dim + 2*B*Y*X*kernel**2", ""),
    claim="Says what and where: it knows neighbours, so that shuffled pixels, rows or columns give something else: "
    "tests/vision/test_cbam.py::test_knows_neighbours, tests/vision/test_cbam.py::test_costs_little.",
    differs=("Means stand before maxima in the kernel's planes, as in timm; the authors' code has maxima first.",),
    verified="third-party",
    example={"inner_dim": 3},
    tries={"reduction": {"inner_dim": None, "reduction": 4}, "momentum": ...},
    exceptions={"L10 batch_rows_do_not_meet_in_training": "the authors' batch normalisation reads the whole batch"},
    defaults={
        "reduction": "code",
        "inner_dim": "code, C / reduction",
        "kernel": "code",
        "bias": "code, timm; the authors' has biases",
        "momentum": "code",
    },
)


class ChannelGate(MapGate):
    """CBAM's gate for each channel: one bottleneck for means and maxima, added before the sigmoid.

    Args:
        dim, inner_dim: C and R.
        bias: of both linear maps.
    """

    def __init__(self, dim: int, inner_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        whole(self, dim=dim, inner_dim=inner_dim)
        self.dim = dim
        self.mlp = Bottleneck(dim, inner_dim, bias=bias)

    def gate(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C 1 1"]:
        most = x.amax((2, 3)) if x.shape[2:].numel() else means(x)  # an empty map has no maximum
        return (self.mlp(means(x)) + self.mlp(most)).sigmoid()[..., None, None]


class SpatialGate(nn.Module):
    """CBAM's gate for each place: a convolution of the channels' mean and maximum there.

    Args:
        kernel: k, odd.
        momentum: of the norm's running statistics.
    """

    def __init__(self, kernel: int = 7, *, momentum: float = 0.01) -> None:
        super().__init__()
        whole(self, kernel=kernel)
        number(self, least=0, most=1, momentum=momentum)
        if kernel % 2 == 0:
            refuse(self, "kernel", "is even", kernel, "an odd one, which has a centre")
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(1, momentum=momentum)

    def gate(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B 1 Y X"]:
        if not x.shape[2:].numel():  # no kernel fits
            return x[:, :1]
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return batch_normed(self.norm, self.conv(pooled)).sigmoid()

    @checked()
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        return x * self.gate(x)


@CARD.module
class CBAM(MapGate):
    """Both gates in turn.

    Args:
        dim: C.
        reduction: C / R.
        inner_dim: R itself.
        kernel: of the places' gate, odd.
        bias: of the channels' gate.
        momentum: of the norm's running statistics.
    """

    def __init__(
        self,
        dim: int,
        *,
        reduction: float = 16,
        inner_dim: int | None = None,
        kernel: int = 7,
        bias: bool = False,
        momentum: float = 0.01,
    ) -> None:
        super().__init__()
        self.dim, self.kernel = dim, kernel
        self.inner_dim = inner_width(self, dim, inner_dim, reduction)
        self.channel = ChannelGate(dim, self.inner_dim, bias=bias)
        self.spatial = SpatialGate(kernel, momentum=momentum)

    def gate(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        """Both together."""
        channels = self.channel.gate(x)
        return channels * self.spatial.gate(x * channels)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        return self.spatial(self.channel(x))

    def extra_repr(self) -> str:
        return f"{self.dim}, inner_dim={self.inner_dim}, kernel={self.kernel}"
