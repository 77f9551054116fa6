"""HyperZZW, local: a depthwise kernel that a network of coordinates makes for the batch at hand."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost
from regard.checks import checked, refuse, whole
from regard.vision.coordinate_kernel import CoordinateKernel, standardised
from regard.vision.hyper_gates import ONCE, PAPER, SLOW

COUPLED = "kernel and norm are made of the whole batch, as in the author's code, also at test time"
STOPPED = "the slow network stops most of its inner gradients, as the author's local feedback does: they are no slopes"

CARD = Card(
    "hyperzzw_local",
    equation="""c = gelu(L_1 mean over the batch of L_r pool_{K x K}(x))
W from a slow network on K x K, c multiplied into each of its layers
out = gelu(BN(L depthwise(x, W))) + b      BN: mean 0 and variance 1 a channel, over the batch;   b: one number""",
    papers=(PAPER,),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("B*Y*X*M*(M + kernel_size**2) + kernel_size**2*hidden*(2*layers*hidden + hidden + M + B*M)", ""),
    claim="One kernel for all maps of a batch, which changes with the batch: "
    "tests/vision/test_hyperzzw.py::test_a_local_kernel_is_the_batchs.",
    differs=(
        "Maps of a batch meet, in training and at test time, as in the code.",
        "The weights of what is kept and of what is normed in the slow network are constants, 1 and 0.1: the code "
        "never trains them.",
        ONCE,
    ),
    verified="third-party",
    example={"hidden": 8},
    exceptions={
        "L10 batch_rows_do_not_meet": COUPLED,
        "L10 batch_rows_do_not_meet_in_training": COUPLED,
        "L50 mapped_over_the_batch": COUPLED,
        **dict.fromkeys(("L23", "L24", "L51"), STOPPED),
    },
    defaults={"kernel_size": "code, the first of four", "hidden": "code", "layers": "code", "frequency": SLOW},
)


@CARD.module
class LocalHyperZZW(nn.Module):
    """The local branch.

    Args:
        dim: C.
        kernel_size: K, odd; at most 31, for the slow network is K^2 times as wide as its channels.
        hidden, layers, frequency: of the slow network, see `CoordinateKernel`.

    Shapes: x (B, C, Y, X) -> (B, C, Y, X).
    """

    def __init__(
        self, dim: int, *, kernel_size: int = 3, hidden: int = 32, layers: int = 2, frequency: float = 1.0
    ) -> None:
        super().__init__()
        whole(self, dim=dim)
        whole(self, most=31, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            refuse(self, "kernel_size", "is even, and has no centre", kernel_size, "an odd int")
        self.dim, self.kernel_size = dim, kernel_size
        grid = (kernel_size, kernel_size)
        self.slow = CoordinateKernel(dim, grid, hidden=hidden, layers=layers, frequency=frequency, context=True)
        self.reduce, self.inner = nn.Linear(dim, hidden), nn.Linear(hidden, hidden)
        self.mixer, self.bias = nn.Conv2d(dim, dim, 1), nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.mixer.weight)
        nn.init.zeros_(self.mixer.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.bias)

    def kernel(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "C K K"]:
        """W, the same for all maps."""
        pooled = F.adaptive_avg_pool2d(x, self.kernel_size).flatten(2).mT
        return self.slow(F.gelu(self.inner(self.reduce(pooled).mean(0))))

    @checked(C="dim")
    def forward(
        self, x: Float[Tensor, "B C Y X"], source: Float[Tensor, "B C Y X"] | None = None
    ) -> Float[Tensor, "B C Y X"]:
        """x, or in its place `source`, under the kernel that x makes."""
        weight, z = self.kernel(x)[:, None].to(x.dtype), x if source is None else source
        u = self.mixer(F.conv2d(z, weight, padding=self.kernel_size // 2, groups=self.dim))
        return F.gelu(standardised(u, (0, 2, 3))) + self.bias.to(u.dtype)
