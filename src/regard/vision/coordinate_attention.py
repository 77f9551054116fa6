"""Coordinate attention: a map is gated row by row and column by column, by gates made of the means along both."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, fits
from regard.vision.gating import ACTIVATIONS, Activation, batch_normed, inner_width
from regard.vision.maps import AXES

CARD = Card(
    "coordinate_attention",
    equation="""h_y = mean over X of x,   w_x = mean over Y of x
z = hswish(BN(W1 [h ; w] + b1))           both strips end to end, one norm; W1 (R, C)
y_c(y, x) = x_c(y, x) sigmoid(Wh z_y + bh)_c sigmoid(Ww z_x + bw)_c""",
    papers=(
        Paper(
            "Coordinate Attention for Efficient Mobile Network Design",
            "Hou, Zhou, Feng",
            2021,
            "2103.02907",
            "official and third-party code; not the paper's body",
        ),
        Paper(
            "MPFNet: A Multi-Prior Fusion Network with a Progressive Training Strategy for "
            "Micro-Expression Recognition",
            "Ma, Zhao, Zhou, Pei, Luo, Xie, Yan, Yin",
            2025,
            "2506.09735",
            "abstract",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("2*B*(Y + X)*M*inner_dim", ""),
    claim="It knows rows and columns, and nothing of which are neighbours: "
    "tests/vision/test_coordinate_attention.py::test_knows_rows_and_columns_but_no_neighbours, "
    "tests/vision/test_coordinate_attention.py::test_gates_of_a_channel_have_rank_1.",
    differs=(
        "Three axes are inferred: three strips, each the mean over the other two axes, and three sigmoids multiplied.",
        "Of MPFNet the attention alone is here, not its two encoders and their training in stages.",
    ),
    verified="third-party",
    example={"inner_dim": 5},
    tries={"reduction": {"inner_dim": None, "reduction": 2}},
    exceptions={"L10 batch_rows_do_not_meet_in_training": "the authors' batch normalisation reads the whole batch"},
    defaults={
        "reduction": "code",
        "inner_dim": "code, C // reduction, never below 8",
        "axes": "code",
        "bias": "code",
        "activation": "code",
    },
)


def strips(x: Float[Tensor, "B C *sizes"]) -> list[Float[Tensor, "B C n"]]:
    """For each axis the means over all others."""
    axes = range(2, x.dim())
    return [x.mean([other for other in axes if other != axis]) for axis in axes]


@CARD.module
class CoordinateAttention(nn.Module):
    """A gate for each axis of each channel.

    Args:
        dim: C.
        reduction: C / R, of which R is made as by the authors: C // reduction, but at least 8.
        inner_dim: R itself.
        axes: 2 for images, 3 for volumes.
        bias: of the linear maps.
        activation: in the bottleneck.
    """

    def __init__(
        self,
        dim: int,
        *,
        reduction: int = 32,
        inner_dim: int | None = None,
        axes: Literal[2, 3] = 2,
        bias: bool = True,
        activation: Activation = "hard_swish",
    ) -> None:
        super().__init__()
        choice(self, (2, 3), axes=axes)
        choice(self, ACTIVATIONS, activation=activation)
        self.dim, self.axes, self.activation = dim, axes, activation
        inner_width(self, dim, inner_dim, reduction)
        self.inner_dim = max(8, dim // reduction) if inner_dim is None else inner_dim
        self.down = nn.Linear(dim, self.inner_dim, bias=bias)
        self.norm = nn.BatchNorm1d(self.inner_dim)
        self.up = nn.ModuleList(nn.Linear(self.inner_dim, dim, bias=bias) for _ in range(axes))

    def gates(self, x: Float[Tensor, "B C *sizes"]) -> list[Float[Tensor, "B C n"]]:
        """One for each axis."""
        parts = strips(x)
        z = ACTIVATIONS[self.activation](batch_normed(self.norm, self.down(torch.cat(parts, 2).mT).mT))
        cut = z.split([part.shape[2] for part in parts], 2)
        return [up(one.mT).mT.sigmoid() for up, one in zip(self.up, cut, strict=True)]

    def gate(self, x: Float[Tensor, "B C *sizes"]) -> Float[Tensor, "B C *sizes"]:
        """Their product."""
        whole: Tensor | None = None
        for one in self._spread(x):
            whole = one if whole is None else whole * one
        return x if whole is None else whole

    def _spread(self, x: Tensor) -> list[Tensor]:
        """The gates, each along its own axis."""
        axes = range(2, x.dim())
        return [
            one.reshape(*one.shape[:2], *(-1 if a == b else 1 for b in axes)) for a, one in zip(axes, self.gates(x))
        ]

    def forward(self, x: Float[Tensor, "B C *sizes"]) -> Float[Tensor, "B C *sizes"]:
        fits(self, f"B C {AXES[self.axes]}", {"C": self.dim}, x=x)
        for one in self._spread(x):
            x = x * one
        return x

    def extra_repr(self) -> str:
        return f"{self.dim}, inner_dim={self.inner_dim}, axes={self.axes}"
