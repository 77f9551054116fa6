"""High-order attention: a gate for each channel and place, from products of its projections."""

import math
from functools import reduce
from operator import mul

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, refuse, whole

CARD = Card(
    "high_order",
    equation="""z_r = P_r1 x * ... * P_rr x        at each place, r different projections C -> I, for r = 1..R
g = 1/R sum_r sigmoid(Q_r ReLU(z_r))     in (0, 1)         y = g * x""",
    papers=(
        Paper(
            "Mixed High-Order Attention Network for Person Re-Identification",
            "Chen, Deng, Hu",
            2019,
            "1908.05819",
            "abstract; the authors' code (model.py, losses.py); not the paper's body",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("B*Y*X*M*(M//8*2)*(order*(order + 1)/2 + order)", ""),
    claim="Models high-order statistics, here the sign of a product of channels, which a first-order gate misses: "
    "tests/vision/test_high_order.py::test_opens_where_two_channels_agree.",
    differs=(
        "As in the authors' code each order has its own sigmoid and the gates are averaged; whether the paper prints "
        "one sigmoid of the summed orders was not read.",
    ),
    verified="third-party",
    defaults={"order": "ours, the least beyond the first", "inner_dim": "code"},
)


def high_order_gate(
    x: Float[Tensor, "B C Y X"], inward: Float[Tensor, "P I C"], outward: Float[Tensor, "R C I"]
) -> Float[Tensor, "B C Y X"]:
    """g. `inward` are P_11, P_21, P_22, P_31, ..., and `outward` Q_1, ..., Q_R.

    ReLU is of the product: of each factor it would lose the signs, whose interaction is the point.
    """
    R = outward.shape[0]
    z = (inward.flatten(0, 1) @ x.flatten(2)).unflatten(1, inward.shape[:2])
    products = [reduce(mul, z[:, r * (r - 1) // 2 : r * (r + 1) // 2].unbind(1)) for r in range(1, R + 1)]
    gates = [(q @ F.relu(p)).sigmoid() for q, p in zip(outward.unbind(0), products, strict=True)]
    return (sum(gates[1:], gates[0]) / R).view_as(x)


@CARD.module
class HighOrderAttention(nn.Module):
    """The gate with its projections, none of which has a bias.

    Args:
        dim: C.
        order: R; all orders up to it, each with projections of its own.
        inner_dim: I; default C // 8 * 2.
    """

    def __init__(self, dim: int, *, order: int = 2, inner_dim: int | None = None) -> None:
        super().__init__()
        whole(self, dim=dim, order=order)
        if inner_dim is None and dim < 8:
            refuse(self, "dim", "leaves no inner width", dim, "8 at least, or an inner_dim")
        inner = dim // 8 * 2 if inner_dim is None else inner_dim
        whole(self, inner_dim=inner)
        self.dim, self.order = dim, order
        self.inward = nn.Parameter(torch.empty(order * (order + 1) // 2, inner, dim))
        self.outward = nn.Parameter(torch.empty(order, dim, inner))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch's convolutions."""
        for weight in (self.inward, self.outward):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)

    def gate(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        """g, in (0, 1)."""
        return high_order_gate(x, self.inward, self.outward)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        return self.gate(x) * x

    def extra_repr(self) -> str:
        return f"{self.dim}, order={self.order}"


class MixedHighOrder(nn.Module):
    """One map under gates of order 1 to R, which share nothing: MHN's branches, in one batch for the layers to come.

    Args:
        dim: C.
        orders: R.
        inner_dim: as for `HighOrderAttention`.
    """

    def __init__(self, dim: int, *, orders: int = 4, inner_dim: int | None = None) -> None:
        super().__init__()
        whole(self, orders=orders)
        gates = (HighOrderAttention(dim, order=r, inner_dim=inner_dim) for r in range(1, orders + 1))
        self.gates = nn.ModuleList(gates)

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "RB C Y X"]:
        """All samples of order 1, then all of order 2: labels are repeated as a whole, `labels.repeat(R)`."""
        return torch.cat([gate(x) for gate in self.gates])
