"""Sparse channel attention (SparseGSA): among the channels of a head, whose likenesses a ReLU cuts off at 0."""

from collections.abc import Callable
from math import ceil
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost
from regard.checks import checked, choice, divides, flag, whole
from regard.kernels.check import check_inputs
from regard.vision.dynamic_local import PAPERS

CARD = Card(
    "sparse_channel",
    equation="""[Q | K | V] = DW3x3(W x)      for each head D channels, each of them the N pixels of its map
A = ReLU(t_h Q^ K^^T)      (D, D);  Q^, K^: rows of norm 1 over the pixels;  t_h starts at 1;  rows sum to anything
y = W_o (A V)""",
    papers=PAPERS,
    gist="Sparse channel attention (SparseGSA): among channels, with a ReLU for the softmax.",
    protocol="FeatureMixer",
    supports={"bidirectional", "padding", "compile"},
    cost=Cost("B*Y*X*(3*M**2 + 27*M + 2*M*D)", ""),
    claim="Likenesses that do not help are exactly 0, and the whole map is seen at a cost linear in pixels: "
    "tests/vision/test_sparse_channel.py::test_half_of_the_weights_are_nothing, "
    "tests/vision/test_sparse_channel.py::test_a_row_of_zeros_gives_zero, "
    "tests/vision/test_sparse_channel.py::test_cost_is_linear_in_pixels.",
    differs=(
        "Masks are ours: hidden pixels are 0 before each convolution and in Q, K and V, as if the map ended there.",
        "Tiles are off by default, so that a layer is one function in training and evaluation. With them, maps come in "
        "batches of any size, where the code takes one at a time.",
    ),
    verified="third-party",
    tries={"tile": 5},
    defaults={
        "activation": "code",
        "bias": "code",
        "tile": "ours, the code's evaluation has 48, another function than its training",
    },
)

Activation = Literal["relu", "gelu", "sigmoid", "identity"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
}


@checked()
def sparse_channel_weights(
    q: Float[Tensor, "B H D N"],
    k: Float[Tensor, "B H D N"],
    temperature: Float[Tensor, "H 1 1"],
    *,
    activation: Activation = "relu",
) -> Float[Tensor, "B H D D"]:
    """Likenesses of channels, cut off at 0; in at least float32."""
    choice("sparse_channel_weights", ACTIVATIONS, activation=activation)
    wide = torch.promote_types(q.dtype, torch.float32)
    unit_q, unit_k = (F.normalize(z.to(wide), dim=-1) for z in (q, k))
    return ACTIVATIONS[activation](temperature * (unit_q @ unit_k.mT))


@checked()
def sparse_channel_attention(
    q: Float[Tensor, "B H D N"],
    k: Float[Tensor, "B H D N"],
    v: Float[Tensor, "B H D N"],
    temperature: Float[Tensor, "H 1 1"],
    *,
    activation: Activation = "relu",
) -> Float[Tensor, "B H D N"]:
    """Of each channel the sum of all that are like it, weighted; rows of weights are not made to sum to 1."""
    check_inputs(q, k, v)
    weights = sparse_channel_weights(q, k, temperature, activation=activation)
    return weights.to(v.dtype) @ v


def tile_starts(size: int, tile: int) -> list[int]:
    """Where tiles begin on an axis: as few as cover it, evenly, the last one at its end; one for a short axis."""
    if size <= tile:
        return [0]
    n = (size - 1) // tile + 1
    step = ceil((size - tile) / (n - 1))
    return [min(i * step, size - tile) for i in range(n)]


@CARD.module
class SparseChannelAttention(nn.Module):
    """`sparse_channel_attention` with projections.

    Args:
        dim: C.
        num_heads: H.
        activation: of the likenesses; those beside "relu" are the authors' ablations, and are not sparse.
        bias: of all convolutions.
        tile: in evaluation, sides of tiles that overlap where they must, each of which attends by itself; means are
            taken where they overlap. The authors' are 96, 72 and 48 for enlargements by 2, 3 and 4. None has the whole
            map, as training always has.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 6,
        *,
        activation: Activation = "relu",
        bias: bool = False,
        tile: int | None = None,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads)
        divides(self, num_heads=num_heads, dim=dim)
        choice(self, ACTIVATIONS, activation=activation)
        flag(self, bias=bias)
        if tile is not None:
            whole(self, tile=tile)
        self.dim, self.num_heads, self.tile = dim, num_heads, tile
        self.activation: Activation = activation
        self.qkv_proj = nn.Conv2d(dim, 3 * dim, 1, bias=bias)
        self.near = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, bias=bias)
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.o_proj = nn.Conv2d(dim, dim, 1, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The temperature is 1 at first; convolutions as torch's."""
        nn.init.ones_(self.temperature)

    def _qkv(self, x: Float[Tensor, "B C Y X"], mask: Bool[Tensor, "B Y X"] | None) -> Float[Tensor, "B C3 Y X"]:
        if mask is None:
            return self.near(self.qkv_proj(x))
        hidden = ~mask[:, None]
        inner = self.qkv_proj(x.masked_fill(hidden, 0)).masked_fill(hidden, 0)
        return self.near(inner).masked_fill(hidden, 0)

    def _heads(self, qkv: Float[Tensor, "B C3 Y X"]) -> list[Float[Tensor, "B H D N"]]:
        return [z.flatten(2).unflatten(1, (self.num_heads, -1)) for z in qkv.chunk(3, 1)]

    @checked(C="dim")
    def weights(
        self, x: Float[Tensor, "B C Y X"], *, mask: Bool[Tensor, "B Y X"] | None = None
    ) -> Float[Tensor, "B H D D"]:
        """Of the whole map, without tiles."""
        q, k, _ = self._heads(self._qkv(x, mask))
        return sparse_channel_weights(q, k, self.temperature, activation=self.activation)

    def _attended(self, qkv: Float[Tensor, "B C3 Y X"]) -> Float[Tensor, "B C Y X"]:
        q, k, v = self._heads(qkv)
        out = sparse_channel_attention(q, k, v, self.temperature, activation=self.activation)
        return out.flatten(1, 2).unflatten(2, qkv.shape[2:])

    def _in_tiles(self, qkv: Float[Tensor, "B C3 Y X"], tile: int) -> Float[Tensor, "B C Y X"]:
        Y, X = qkv.shape[2:]
        tall, wide = min(tile, Y), min(tile, X)
        corners = [(y, x) for y in tile_starts(Y, tile) for x in tile_starts(X, tile)]
        tiles = self._attended(torch.cat([qkv[..., y : y + tall, x : x + wide] for y, x in corners]))
        total, times = torch.zeros_like(qkv[:, : self.dim]), qkv.new_zeros(Y, X)
        for (y, x), part in zip(corners, tiles.chunk(len(corners)), strict=True):
            place = (..., slice(y, y + tall), slice(x, x + wide))
            total[place] = total[place] + part
            times[place] += 1
        return total / times

    @checked(C="dim")
    def forward(
        self, x: Float[Tensor, "B C Y X"], *, mask: Bool[Tensor, "B Y X"] | None = None
    ) -> Float[Tensor, "B C Y X"]:
        """Attend among channels. `mask`: True = a real pixel; what stands in others changes nothing."""
        qkv = self._qkv(x, mask)
        tiled = self.tile is not None and not self.training and qkv.numel() > 0
        return self.o_proj(self._in_tiles(qkv, self.tile) if tiled and self.tile else self._attended(qkv))

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, activation={self.activation!r}, tile={self.tile}"
