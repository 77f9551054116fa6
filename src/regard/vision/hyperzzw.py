"""HyperZZW, global: a map times a kernel of coordinates meets a map, in a matrix product a channel."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost
from regard.checks import checked, choice, refuse, whole
from regard.vision.coordinate_kernel import CoordinateKernel, linear_start, standardised
from regard.vision.hyper_gates import ONCE, PAPER, SLOW, HyperChannelGate

CARD = Card(
    "hyperzzw",
    equation="""K = x * W   (W from a slow network on S x S),   out = K @ z:   out[y, x'] = sum_x K[y, x] z[x, x']
gated:     z = IN(RGU_a(K) + RGU_b(x)),   RGU(v) = L_y (gelu(IN(L_k v * L_q L_v v)) + bias map)
mixed:     z = IN(L x),   channels:  z = IN(channel gate(x))      L: 1 x 1;   IN: each map has mean 0, variance 1""",
    papers=(PAPER,),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("B*Y*X*M*X + Y*X*hidden*(layers*hidden + M)", ""),
    claim="A pixel sees its row through the kernel and its column through z, not the whole map: "
    "tests/vision/test_hyperzzw.py::test_the_product_sees_a_row_and_a_column.",
    differs=(
        "As in the code the global branch is no convolution, which the abstract's words suggest; IN, though, reads "
        "whole maps.",
        "Maps of another size than the kernel's grid have its beta and the bias maps interpolated.",
        ONCE,
    ),
    verified="third-party",
    example={"grid": 8, "hidden": 8},
    tries={"grid": 6},
    defaults={"grid": "code", "source": "code", "hidden": "code", "layers": "code", "frequency": SLOW},
)

Source = Literal["gated", "mixed", "channels"]


def hyper_product(kernel: Float[Tensor, "B C S S"], z: Float[Tensor, "B C S S"]) -> Float[Tensor, "B C S S"]:
    """A matrix product over the two axes of places."""
    return kernel @ z


class RecursiveGate(nn.Module):
    """The RGU of the card's equation, C -> C."""

    def __init__(self, dim: int, grid: int) -> None:
        super().__init__()
        self.k_proj, self.q_proj, self.v_proj, self.o_proj = (nn.Conv2d(dim, dim, 1) for _ in range(4))
        self.bias = nn.Parameter(torch.empty(grid, grid))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for proj in (self.k_proj, self.q_proj, self.v_proj, self.o_proj):
            linear_start(proj)
        nn.init.zeros_(self.bias)

    def forward(self, v: Float[Tensor, "B C S S"]) -> Float[Tensor, "B C S S"]:
        inner = F.gelu(standardised(self.k_proj(v) * self.q_proj(self.v_proj(v))))
        bias: Tensor = self.bias
        if bias.shape != v.shape[2:]:
            bias = F.interpolate(bias[None, None], v.shape[2:], mode="bilinear", align_corners=True)[0, 0]
        return self.o_proj(inner + bias.to(inner.dtype))


@CARD.module
class GlobalHyperZZW(nn.Module):
    """The global branch.

    Args:
        dim: C.
        grid: of the slow kernel, grid x grid; maps are square, of any size.
        source: what the kernel is multiplied with.
        hidden, layers, frequency: of the slow network, see `CoordinateKernel`.

    Shapes: x (B, C, S, S) -> (B, C, S, S).
    """

    def __init__(
        self,
        dim: int,
        *,
        grid: int = 32,
        source: Source = "gated",
        hidden: int = 64,
        layers: int = 2,
        frequency: float = 1.0,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, grid=grid)
        choice(self, get_args(Source), source=source)
        self.dim, self.grid, self.source = dim, grid, source
        self.slow = CoordinateKernel(dim, (grid, grid), hidden=hidden, layers=layers, frequency=frequency)
        if source == "gated":
            self.slow_gate, self.fast_gate = RecursiveGate(dim, grid), RecursiveGate(dim, grid)
        elif source == "mixed":
            self.mixer = nn.Conv2d(dim, dim, 1)
        else:
            self.gate = HyperChannelGate(dim, frequency=frequency)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.source == "mixed":
            nn.init.kaiming_normal_(self.mixer.weight)
            nn.init.zeros_(self.mixer.bias)  # type: ignore[arg-type]

    def kernel(self, x: Float[Tensor, "B C S S"]) -> Float[Tensor, "B C S S"]:
        """K."""
        if x.shape[2] != x.shape[3]:
            refuse(self, "x", "is no square", tuple(x.shape), "(B, C, S, S)")
        return x * self.slow(sizes=x.shape[2:]).to(x.dtype)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        kernel = self.kernel(x)
        if self.source == "gated":
            z = self.slow_gate(kernel) + self.fast_gate(x)
        else:
            z = self.mixer(x) if self.source == "mixed" else self.gate(x)
        return hyper_product(kernel.to(z.dtype), standardised(z))
