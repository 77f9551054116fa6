"""Attention U-Net's gate: a coarser signal decides, place by place, how much of skip features passes."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, fits, refuse, whole
from regard.shapes import HeadShape
from regard.vision.gating import batch_normed
from regard.vision.maps import AXES


def _inputs(shape: HeadShape) -> tuple[Tensor, Tensor]:
    """Skip features of 8 x 8 and a gating signal of 4 x 4."""
    generator = torch.Generator().manual_seed(2)
    sizes = ((2, shape.dim, 8, 8), (2, shape.dim, 4, 4))
    x, g = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return x, g


CARD = Card(
    "attention_gate",
    equation="""t = theta(x)                         convolution of kernel s, stride s, no bias
p = up(phi(g))                       pointwise, resized to t
a = up(sigmoid(psi(ReLU(t + p))))    one coefficient for each place, in (0, 1), resized to x
y = BN(W(a x))                       pointwise""",
    papers=(
        Paper(
            "Attention U-Net: Learning Where to Look for the Pancreas",
            "Oktay et al.",
            2018,
            "1804.03999",
            "abstract; official code",
        ),
    ),
    protocol="FeatureMixer",
    inputs=_inputs,
    supports={"bidirectional", "compile"},
    cost=Cost("B*Y*X*M*(M + M/2 + 1)", ""),
    claim="Suppresses irrelevant regions, by coefficients in (0, 1), at small cost in parameters: "
    "tests/vision/test_attention_gate.py::test_what_the_gate_closes_does_not_count.",
    differs=(
        "Resizing aligns the edges of the maps by default, as the authors' code does on today's torch; "
        "align_corners=True aligns the outermost pixels, as it did on the torch that it was written for.",
    ),
    verified="third-party",
    exceptions={"L10 batch_rows_do_not_meet_in_training": "the authors' batch normalisation reads the whole batch"},
    defaults={
        "gating_dim": "ours, as wide as dim",
        "inner_dim": "code",
        "subsample": "code",
        "axes": "ours",
        "normalize": "code",
        "align_corners": "code, on today's torch",
    },
)

CONVOLUTIONS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def gate_coefficients(
    theta: Float[Tensor, "B F *coarse"],
    phi: Float[Tensor, "B F *gating"],
    psi: nn.Module,
    sizes: tuple[int, ...],
    *,
    normalize: Literal["sigmoid", "softmax"] = "sigmoid",
    align_corners: bool = False,
) -> Float[Tensor, "B 1 *sizes"]:
    """How much of each place to keep: from projected features and gating signal, psi (F channels to 1) and a resize.

    "softmax", over all coarse places, is the authors' residual variant.
    """
    z = psi(F.relu(theta + _resize(phi, theta.shape[2:], align_corners=align_corners)))
    wide = torch.promote_types(z.dtype, torch.float32)
    a = z.to(wide).sigmoid() if normalize == "sigmoid" else z.flatten(1).softmax(-1, dtype=wide).view_as(z)
    return _resize(a.to(z.dtype), sizes, align_corners=align_corners)


def _resize(z: Tensor, sizes: tuple[int, ...], *, align_corners: bool) -> Tensor:
    mode = {2: "bilinear", 3: "trilinear"}[len(sizes)]
    return z if z.shape[2:] == sizes else F.interpolate(z, size=tuple(sizes), mode=mode, align_corners=align_corners)


@CARD.module
class AttentionGate(nn.Module):
    """The gate with its convolutions.

    Args:
        dim: channels of the skip features x.
        gating_dim: channels of the coarser signal g; default dim.
        inner_dim: F; default dim // 2, as the code's; the authors' networks pass dim.
        subsample: s, one for all axes or one for each; 2 in the code.
        axes: 2 for images, 3 for volumes.
        normalize, align_corners: as for `gate_coefficients`.
    """

    def __init__(
        self,
        dim: int,
        *,
        gating_dim: int | None = None,
        inner_dim: int | None = None,
        subsample: int | tuple[int, ...] = 2,
        axes: Literal[2, 3] = 2,
        normalize: Literal["sigmoid", "softmax"] = "sigmoid",
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        choice(self, CONVOLUTIONS, axes=axes)
        choice(self, ("sigmoid", "softmax"), normalize=normalize)
        steps = tuple(subsample) if isinstance(subsample, tuple | list) else (subsample,) * axes
        if len(steps) != axes:
            refuse(self, "subsample", "has another number of axes", subsample, f"one int, or {axes}")
        for step in steps:
            whole(self, subsample=step)
        conv, inner = CONVOLUTIONS[axes], max(1, dim // 2) if inner_dim is None else inner_dim
        gating_dim = dim if gating_dim is None else gating_dim
        whole(self, dim=dim, gating_dim=gating_dim, inner_dim=inner)
        self.dim, self.gating_dim, self.axes = dim, gating_dim, axes
        self.normalize, self.align_corners = normalize, align_corners
        self.theta = conv(dim, inner, steps, stride=steps, bias=False)
        self.phi = conv(self.gating_dim, inner, 1)
        self.psi = conv(inner, 1, 1)
        self.out = conv(dim, dim, 1)
        self.norm = NORMS[axes](dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors: Kaiming normal by fan in; the norm's weight around 1."""
        for conv in (self.theta, self.phi, self.psi, self.out):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        self.norm.reset_parameters()
        nn.init.normal_(self.norm.weight, 1.0, 0.02)

    def coefficients(
        self, x: Float[Tensor, "B C *sizes"], g: Float[Tensor, "B Cg *gating"]
    ) -> Float[Tensor, "B 1 *sizes"]:
        """The map a, in (0, 1)."""
        sizes = fits(self, f"B C {AXES[self.axes]}", {"C": self.dim}, x=x)
        fits(self, f"B C {AXES[self.axes]}", {"B": sizes["B"], "C": self.gating_dim}, g=g)
        if any(n < step for n, step in zip(x.shape[2:], self.theta.stride, strict=True)):
            refuse(self, "x", "is smaller than a step", tuple(x.shape), f"axes of at least {self.theta.stride}")
        options: dict[str, Any] = {"normalize": self.normalize, "align_corners": self.align_corners}
        return gate_coefficients(self.theta(x), self.phi(g), self.psi, x.shape[2:], **options)

    def forward(self, x: Float[Tensor, "B C *sizes"], g: Float[Tensor, "B Cg *gating"]) -> Float[Tensor, "B C *sizes"]:
        """Gate skip features x by the signal g of a coarser grid."""
        return batch_normed(self.norm, self.out(self.coefficients(x, g) * x))
