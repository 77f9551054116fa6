"""PATNet's channel half: some channels are convolved, the others gated by all means and deviations.

Attention is cheap where convolution was left out: a partial convolution leaves most channels as they are, and here it
is those that a gate weighs, one number a channel.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, number, refuse, whole
from regard.vision._shared import MapNorm, hard_sigmoid

PAPERS = (
    Paper(
        "Partial Convolution Meets Visual Attention",
        "Huang, Yang, Li, Liu, Tian, Peng, Ren, Barsoum",
        2025,
        "2503.03148",
        "abstract; official code (haiduo/PartialNet)",
    ),
)
BATCH = {"L10 batch_rows_do_not_meet_in_training": "batch norms take all maps of a batch together in training"}

CHANNEL = Card(
    "partial_channel",
    equation="""[x1 | x2] = split(x, c, C - c),  c = C // divide        y = [K * x1 ; BN(g . x2)]      K of 3 x 3
g = hardsigmoid(BN(W0 m + W1 s)),  m and s the mean and unbiased standard deviation of a channel over all pixels""",
    papers=PAPERS,
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("9*B*Y*X*(M/divide)**2 + 2*B*(M - M/divide)**2", ""),
    claim="A fifth of the parameters of a 3 x 3 convolution, and channels that are not convolved are weighed by all "
    "of their pixels: tests/vision/test_partial.py::test_parameters_and_who_reads_whom.",
    verified="third-party",
    exceptions=BATCH,
    example={"divide": 3},
    defaults={"divide": "code"},
)

SPATIAL = Card(
    "partial_spatial",
    equation="""[u | v] = split(x, C - p C, p C)        y = [BN(a . u) ; V BN(v)]        V pointwise
a = hardsigmoid(w . u),  one number for each pixel""",
    papers=PAPERS,
    gist="PATNet's spatial half: a pixel's first channels are weighed together, the last ones are mixed.",
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("B*Y*X*(M*(1 - partial) + (M*partial)**2)", ""),
    claim="Whole pixels are weighed, at the cost of one product each: "
    "tests/vision/test_partial.py::test_a_pixel_is_kept_or_dropped_as_a_whole.",
    differs=("It stands behind the last layer of an MLP there, and is off in all but one of the released settings.",),
    verified="third-party",
    exceptions=BATCH,
    example={"partial": 0.25},
    defaults={"partial": "code"},
)


def channel_statistics(x: Float[Tensor, "B C Y X"]) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    """Mean and unbiased standard deviation over pixels, in at least float32."""
    deviation, mean = torch.std_mean(x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2), -1)
    return mean.to(x.dtype), deviation.to(x.dtype)


def start(module: nn.Module) -> None:
    """As in the authors' code: truncated normal of 0.02, no bias."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def convolved(who: nn.Module, dim: int, divide: int) -> int:
    """c, of how many channels the convolution is; some must be left."""
    whole(who, dim=dim)
    whole(who, 2, most=dim, divide=divide)
    return dim // divide


@CHANNEL.module
class PartialChannelAttention(nn.Module):
    """PAT_ch: the first c channels through a convolution, the others through the gate.

    Args:
        dim: C.
        divide: C / c, from 2 to C.
    """

    def __init__(self, dim: int, *, divide: int = 4) -> None:
        super().__init__()
        c = convolved(self, dim, divide)
        self.dim, self.divide, self.kept = dim, divide, c
        self.conv = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.mean_mix, self.deviation_mix = (nn.Linear(dim - c, dim - c, bias=False) for _ in range(2))
        self.gate_norm, self.norm = (MapNorm(dim - c) for _ in range(2))
        start(self)

    def gate(self, x: Float[Tensor, "B c Y X"]) -> Float[Tensor, "B c 1 1"]:
        """g, in [0, 1], of the channels that are not convolved."""
        mean, deviation = channel_statistics(x)
        z = self.mean_mix(mean) + self.deviation_mix(deviation)
        return hard_sigmoid(self.gate_norm(z[..., None, None]))

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        if x.shape[2] * x.shape[3] == 1:
            refuse(self, "x", "has no deviation", tuple(x.shape), "(B, C, Y, X) with two pixels or more")
        near, rest = x.split([self.kept, self.dim - self.kept], 1)
        return torch.cat([self.conv(near), self.norm(self.gate(rest) * rest)], 1)

    def extra_repr(self) -> str:
        return f"{self.dim}, divide={self.divide}"


@SPATIAL.module
class PartialSpatialAttention(nn.Module):
    """PAT_sp: a pixel's first channels are weighed by one number, the last ones go through a pointwise convolution.

    Args:
        dim: C.
        partial: p, the share of channels that are convolved, so that both parts have some.
    """

    def __init__(self, dim: int, *, partial: float = 0.5) -> None:
        super().__init__()
        whole(self, 2, dim=dim)
        number(self, least=1 / dim, below=1, partial=partial)
        d = int(partial * dim)
        self.dim, self.partial, self.weighed = dim, partial, dim - d
        self.attend = nn.Conv2d(dim - d, 1, 1, bias=False)
        self.conv = nn.Conv2d(d, d, 1, bias=False)
        self.attend_norm, self.conv_norm = MapNorm(dim - d), MapNorm(d)
        start(self)

    def gate(self, x: Float[Tensor, "B c Y X"]) -> Float[Tensor, "B 1 Y X"]:
        """a, in [0, 1], from the channels that it weighs."""
        return hard_sigmoid(self.attend(x))

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        u, v = x.split([self.weighed, self.dim - self.weighed], 1)
        return torch.cat([self.attend_norm(self.gate(u) * u), self.conv(self.conv_norm(v))], 1)

    def extra_repr(self) -> str:
        return f"{self.dim}, partial={self.partial}"
