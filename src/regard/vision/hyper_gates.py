"""HyperZZW's channel gate: each channel passes as its squared mean and a kernel of its place say."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, whole
from regard.vision.coordinate_kernel import CoordinateKernel

PAPER = Paper(
    "HyperZcdotZcdotW Operator Connects Slow-Fast Networks for Full Context Interaction",
    "Zhang",
    2024,
    "2401.17948",
    "abstract; the author's code as of earlier commits, without the group standardisation, the network around the "
    "blocks and the frequency of its sines",
)
SLOW = "ours, for the code's setting of it was not to be found"
ONCE = "The output layer is scaled by the grid's size when it is built, where the code does it at the first call."

CARD = Card(
    "hyper_channel_gate",
    equation="""y_c = mean of channel c,   out = x sigmoid(W_c y_c^2)      W from a slow network on C points""",
    papers=(PAPER,),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("M*layers*hidden*hidden", ""),
    claim="The mean's sign is lost, and at mean 0 a gate stands at 1/2: "
    "tests/vision/test_hyperzzw.py::test_the_gate_is_even_in_the_mean.",
    differs=(ONCE,),
    verified="third-party",
    example={"hidden": 8},
    defaults={"hidden": "code", "layers": "code", "frequency": SLOW},
)

INTERACTION = Card(
    "hyper_interaction",
    gist="HyperZZW's interaction: a map gates another, by kernels of channels and of places.",
    equation="""s_c = U_c mean_c(y)^2,   s_s = V_s (mean over channels of y_s)^2,   out = x sigmoid(s_c s_s)
U and V from slow networks on C points and on grid x grid""",
    papers=(PAPER,),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("layers*(M*channel_hidden**2 + Y*X*hidden**2)", ""),
    claim="Every pixel has a gate of its own, which is even in the deciding map and free in the other: "
    "tests/vision/test_hyperzzw.py::test_the_interaction_gates_pixels.",
    differs=("One map may decide about itself, as in the code.", ONCE, "Maps of another size have beta interpolated."),
    verified="third-party",
    example={"grid": 8, "hidden": 8, "channel_hidden": 8},
    tries={"grid": 6},
    defaults={"grid": "code", "channel_hidden": "code", "hidden": "code", "layers": "code", "frequency": SLOW},
)


def twice(kernel: Float[Tensor, "*b"], y: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """The elementwise operator: y times the kernel that y has been multiplied into."""
    return (y * kernel) * y


@CARD.module
class HyperChannelGate(nn.Module):
    """A gate for each channel.

    Args:
        dim: C.
        hidden, layers, frequency: of the slow network, see `CoordinateKernel`.
    """

    def __init__(self, dim: int, *, hidden: int = 32, layers: int = 2, frequency: float = 1.0) -> None:
        super().__init__()
        whole(self, dim=dim)
        self.dim = dim
        self.slow = CoordinateKernel(1, (dim,), hidden=hidden, layers=layers, frequency=frequency)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        kernel = self.slow()[0]
        score = twice(kernel, x.mean((2, 3)).to(kernel.dtype))
        return x * score.sigmoid().to(x.dtype)[..., None, None]


@INTERACTION.module
class HyperInteraction(nn.Module):
    """A gate for each channel of each pixel.

    Args:
        dim: C.
        grid: of the slow kernel, grid x grid.
        channel_hidden, hidden: of the slow networks of channels and of places.
        layers, frequency: of both, see `CoordinateKernel`.
    """

    def __init__(
        self,
        dim: int,
        *,
        grid: int = 32,
        channel_hidden: int = 16,
        hidden: int = 64,
        layers: int = 2,
        frequency: float = 1.0,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, grid=grid, channel_hidden=channel_hidden)
        self.dim = dim
        self.channels = CoordinateKernel(1, (dim,), hidden=channel_hidden, layers=layers, frequency=frequency)
        self.places = CoordinateKernel(1, (grid, grid), hidden=hidden, layers=layers, frequency=frequency)

    @checked(C="dim")
    def forward(
        self, y: Float[Tensor, "B C Y X"], x: Float[Tensor, "B C Y X"] | None = None
    ) -> Float[Tensor, "B C Y X"]:
        """x, or y itself, gated by what y decides."""
        x = y if x is None else x
        of_channels, of_places = self.channels()[0], self.places(sizes=y.shape[2:])[0]
        wide = y.to(of_places.dtype)
        score = twice(of_channels, wide.mean((2, 3)))[..., None, None] * twice(of_places, wide.mean(1))[:, None]
        return x * torch.sigmoid(score).to(x.dtype)
