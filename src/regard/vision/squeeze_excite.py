"""Squeeze-excite: each channel is weighed by what a bottleneck makes of all channels' means."""

from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, whole
from regard.vision.gating import SQUASHES, Activation, Bottleneck, MapGate, Squash, inner_width, means

CARD = Card(
    "se",
    equation="""y = x sigmoid(W2 relu(W1 m + b1) + b2)      m the mean of each channel, W1 (R, C)""",
    papers=(
        Paper("Squeeze-and-Excitation Networks", "Hu, Shen, Albanie, Sun, Wu", 2018, "1709.01507", "third-party code"),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("2*B*M*inner_dim", ""),
    claim="Weighs channels by the whole map and knows no places, at a cost that is the same for all maps: "
    "tests/vision/test_squeeze_excite.py::test_commutes_with_any_shuffle_and_costs_the_same_on_any_map.",
    verified="third-party",
    example={"inner_dim": 3},
    tries={"reduction": {"inner_dim": None, "reduction": 1.5}},
    defaults={
        "reduction": "code, timm",
        "inner_dim": "code, timm: C / reduction as a multiple of 8, never below it",
        "bias": "code, timm",
        "activation": "code, timm",
        "squash": "code, timm",
    },
)

EFFECTIVE = Card(
    "ese",
    gist="Effective squeeze-excite: each channel is weighed by one linear map of all channels' means.",
    equation="y = x h(W m + b),   h(z) = clamp(z + 3, 0, 6) / 6      m the mean of each channel, W (C, C)",
    papers=(
        Paper(
            "CenterMask : Real-Time Anchor-Free Instance Segmentation",
            "Lee, Park",
            2020,
            "1911.06667",
            "third-party code",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("B*M*M", ""),
    claim="Without a bottleneck, no direction of the means is lost to the gate: "
    "tests/vision/test_squeeze_excite.py::test_no_bottleneck_loses_nothing.",
    differs=("Gradients are exact; torch's hard sigmoid has 1/6 as a float32 number in its backward.",),
    verified="third-party",
    defaults={"squash": "code, timm"},
)


@CARD.module
class SqueezeExcite(MapGate):
    """A gate for each channel.

    Args:
        dim: C.
        reduction: C / R, of which R is made as timm does: a multiple of 8.
        inner_dim: R itself.
        bias: of both linear maps.
        activation, squash: in the bottleneck and behind it; "silu" in EfficientNet, "hard_sigmoid" in MobileNetV3.
    """

    def __init__(
        self,
        dim: int,
        *,
        reduction: float = 16,
        inner_dim: int | None = None,
        bias: bool = True,
        activation: Activation = "relu",
        squash: Squash = "sigmoid",
    ) -> None:
        super().__init__()
        choice(self, SQUASHES, squash=squash)
        self.dim, self.squash = dim, squash
        self.inner_dim = inner_width(self, dim, inner_dim, reduction, multiple=8)
        self.mlp = Bottleneck(dim, self.inner_dim, bias=bias, activation=activation)

    def gate(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C 1 1"]:
        return SQUASHES[self.squash](self.mlp(means(x)))[..., None, None]

    def extra_repr(self) -> str:
        return f"{self.dim}, inner_dim={self.inner_dim}, squash={self.squash!r}"


@EFFECTIVE.module
class EffectiveSqueezeExcite(MapGate):
    """A gate for each channel.

    Args:
        dim: C.
        squash: behind the linear map.
    """

    def __init__(self, dim: int, *, squash: Squash = "hard_sigmoid") -> None:
        super().__init__()
        whole(self, dim=dim)
        choice(self, SQUASHES, squash=squash)
        self.dim, self.squash = dim, squash
        self.mix = nn.Linear(dim, dim)

    def gate(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C 1 1"]:
        return SQUASHES[self.squash](self.mix(means(x)))[..., None, None]

    def extra_repr(self) -> str:
        return f"{self.dim}, squash={self.squash!r}"
