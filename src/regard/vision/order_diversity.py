"""Order diversity: an encoder learns to make features of several orders alike, and they to differ."""

from itertools import combinations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, refuse, whole
from regard.shapes import HeadShape
from regard.vision.gating import batch_normed


def _inputs(shape: HeadShape) -> tuple[Tensor, ...]:
    """Features of 3 samples under 4 orders."""
    return (torch.randn(12, shape.dim, generator=torch.Generator().manual_seed(6), dtype=torch.float64),)


REVERSED = "features get the gradient's opposite, by design"

CARD = Card(
    "order_diversity",
    equation="""e = E(n(f))     f of each order and sample, n(f) = f / ||f||; towards f the gradient is reversed
loss = 2 / (R (R-1)) sum over i < j of the mean over samples of || n(e_i) - n(e_j) ||""",
    papers=(
        Paper(
            "Mixed High-Order Attention Network for Person Re-Identification",
            "Chen, Deng, Hu",
            2019,
            "1908.05819",
            "abstract; the authors' code (losses.py); not the paper's body",
        ),
    ),
    protocol="Loss",
    inputs=_inputs,
    supports={"bidirectional", "compile"},
    cost=Cost("N*(M*hidden + hidden*hidden)", ""),
    verified="reconstructed",
    claim="Keeps the orders of attention from becoming alike, against an encoder that makes them so: "
    "tests/vision/test_order_diversity.py::test_features_move_apart_while_the_encoder_resists.",
    exceptions={"L23": REVERSED, "L51": REVERSED},
    defaults={"orders": "ours", "hidden": "code"},
)


def reversed_gradient(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """x, with the gradient of -x."""
    return 2 * x.detach() - x


def mean_distance(e: Float[Tensor, "R B H"]) -> Float[Tensor, ""]:
    """Of the normalised codes of any two orders, over pairs and samples."""
    unit = F.normalize(e, dim=-1)
    gaps = [torch.linalg.vector_norm(unit[i] - unit[j], dim=-1) for i, j in combinations(range(e.shape[0]), 2)]
    return torch.stack(gaps).mean()


@CARD.module
class OrderDiversity(nn.Module):
    """The loss with its encoder, to be added to the task's: alpha times it (1.4 in the authors' commands).

    Args:
        dim: F, of the features.
        orders: R, 2 at least.
        hidden: of the encoder.
    """

    def __init__(self, dim: int, *, orders: int = 4, hidden: int = 128) -> None:
        super().__init__()
        whole(self, dim=dim, hidden=hidden)
        whole(self, 2, orders=orders)
        self.dim, self.orders = dim, orders
        self.first = nn.Linear(dim, hidden, bias=False)
        self.first_norm = nn.BatchNorm1d(hidden)
        self.second = nn.Linear(hidden, hidden)
        self.second_norm = nn.BatchNorm1d(hidden)

    def encode(self, features: Float[Tensor, "N F"]) -> Float[Tensor, "N hidden"]:
        """e, of normalised features."""
        z = F.relu(batch_normed(self.first_norm, self.first(features)))
        return batch_normed(self.second_norm, self.second(z))

    @checked(F="dim")
    def forward(self, features: Float[Tensor, "N F"]) -> Float[Tensor, ""]:
        """`features` are those of all samples under the first order, then under the second, and so on."""
        if not len(features) or len(features) % self.orders:
            refuse(self, "features", "are no samples under each order", tuple(features.shape), f"{self.orders} B rows")
        e = self.encode(reversed_gradient(F.normalize(features, dim=-1)))
        return mean_distance(e.unflatten(0, (self.orders, -1)))
