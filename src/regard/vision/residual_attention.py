"""Residual attention: a soft mask, made bottom-up and top-down, adds to features, never takes away."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, divides, flag, refuse, whole
from regard.vision.gating import batch_normed

CARD = Card(
    "residual_attention",
    equation="""t = U(x), U a residual unit: x + W3 ReLU(BN(W2 ReLU(BN(W1 ReLU(BN(x)))))), W2 3 x 3      T = U(U(t))
z_0 = t, z_i = U(pool(z_(i-1))), i = 1..d;  u = U(z_d);  u = U(resize(u, z_i) + U(z_i)), i = d-1..1
M = sigmoid(W5 ReLU(BN(W4 ReLU(BN(resize(u, T))))))              y = U((1 + M) T)""",
    papers=(
        Paper(
            "Residual Attention Network for Image Classification",
            "Wang, Jiang, Qian, Yang, Li, Zhang, Wang, Tang",
            2017,
            "1704.06904",
            "abstract; the authors' Attention-56 prototxt, every layer; not the paper's body",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost(
        "B*Y*X*M*M*((2/bottleneck + 9/bottleneck**2)*(pre + trunk + 1 + 2*per_level/4**depth"
        " + (2*per_level + 1)*(1 - 4/4**depth)/3) + 2)",
        "",
    ),
    claim="Stacked modules don't shrink features, as plain masks do; with a mask of 0 a module is its trunk: "
    "tests/vision/test_residual_attention.py::test_a_stack_keeps_what_plain_masks_shrink.",
    differs=(
        'The masks "channel" and "spatial" are recalled, not read; the spatial one takes the deviation over places, '
        "with 1e-5 added to the variance.",
    ),
    verified="third-party",
    # With weights as the laws draw them logits are so large that a sigmoid of each would let no gradient through.
    example={"depth": 2, "mask": "spatial"},
    exceptions={"L10 batch_rows_do_not_meet_in_training": "the authors' batch normalisation reads the whole batch"},
    defaults={
        "depth": "code, at the first stage",
        "pre": "code",
        "trunk": "code",
        "per_level": "code",
        "mask": "code",
        "residual": "code",
        "bottleneck": "code",
    },
)

Mask = Literal["sigmoid", "channel", "spatial", "none"]


def mask_values(logits: Float[Tensor, "B C Y X"], mask: Literal["sigmoid", "channel", "spatial"]) -> Tensor:
    """M: the sigmoid of each number; each place's channels as a unit vector; or the sigmoid of each channel's
    normalised map."""
    if mask == "sigmoid":
        return logits.sigmoid()
    if mask == "channel":
        return F.normalize(logits, dim=1)
    z = logits - logits.mean((2, 3), keepdim=True)
    return (z * (z.square().mean((2, 3), keepdim=True) + 1e-5).rsqrt()).sigmoid()


def soft_mask(trunk: Float[Tensor, "*n"], mask: Float[Tensor, "*n"], *, residual: bool = True) -> Float[Tensor, "*n"]:
    """(1 + M) T, or the naive M T."""
    return trunk * (1 + mask) if residual else trunk * mask


def _resized(z: Float[Tensor, "B C y x"], like: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
    return F.interpolate(z, size=like.shape[2:], mode="bilinear", align_corners=True)


class Unit(nn.Module):
    """A pre-activation residual unit, whose shortcut takes x as it is."""

    def __init__(self, dim: int, *, bottleneck: int = 4) -> None:
        super().__init__()
        inner = dim // bottleneck
        self.norms = nn.ModuleList([nn.BatchNorm2d(n) for n in (dim, inner, inner)])
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(dim, inner, 1, bias=False),
                nn.Conv2d(inner, inner, 3, padding=1, bias=False),
                nn.Conv2d(inner, dim, 1, bias=False),
            ]
        )

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        z = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            z = conv(F.relu(batch_normed(norm, z)))
        return x + z


class BottomUpTopDown(nn.Module):
    """The mask's logits: down `depth` times by pooling, and up again past a skip from each size.

    Args:
        dim: C.
        depth: d; both sides of a map are at least 2^d.
        per_level: units at each size, down and up.
        bottleneck: a unit's inner width is C over it.
    """

    def __init__(self, dim: int, *, depth: int = 3, per_level: int = 1, bottleneck: int = 4) -> None:
        super().__init__()
        whole(self, dim=dim, per_level=per_level, bottleneck=bottleneck)
        whole(self, most=16, depth=depth)
        divides(self, bottleneck=bottleneck, dim=dim)
        self.depth = depth

        def units(number: int) -> nn.Sequential:
            return nn.Sequential(*[Unit(dim, bottleneck=bottleneck) for _ in range(number)])

        self.down = nn.ModuleList([units(per_level) for _ in range(depth)])
        self.bottom = units(per_level)
        self.skip = nn.ModuleList([units(1) for _ in range(depth - 1)])
        self.up = nn.ModuleList([units(per_level) for _ in range(depth - 1)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(dim) for _ in range(2)])
        self.linears = nn.ModuleList([nn.Conv2d(dim, dim, 1, bias=False) for _ in range(2)])

    def forward(self, t: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        if min(t.shape[2:]) < 2**self.depth:
            refuse(self, "x", "is too small", tuple(t.shape), f"{2**self.depth} places at least on both axes")
        levels = [t]
        for units in self.down:
            # Caffe's rule for the last window, which may hang over the edge.
            levels.append(units(F.max_pool2d(levels[-1], 3, 2, ceil_mode=True)))
        u = self.bottom(levels[-1])
        for z, skip, up in zip(levels[-2:0:-1], self.skip, self.up, strict=True):
            u = up(_resized(u, z) + skip(z))
        u = _resized(u, t)
        for norm, linear in zip(self.norms, self.linears, strict=True):
            u = linear(F.relu(batch_normed(norm, u)))
        return u


@CARD.module
class ResidualAttention(nn.Module):
    """The attention module that stands between a residual network's stages.

    Args:
        dim: C.
        depth: how often the mask's branch halves the map: 3, 2 and 1 at the stages of Attention-56. Both sides of the
            map are at least 2^depth.
        pre, trunk, per_level: units before the branches part, in the trunk, and at each size of the mask's branch.
        mask: how logits become the mask; with "none" there is no such branch, and the trunk passes as it is.
        residual: (1 + M) T, or M T.
        bottleneck: a unit's inner width is C over it.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int = 3,
        pre: int = 1,
        trunk: int = 2,
        per_level: int = 1,
        mask: Mask = "sigmoid",
        residual: bool = True,
        bottleneck: int = 4,
    ) -> None:
        super().__init__()
        choice(self, ("sigmoid", "channel", "spatial", "none"), mask=mask)
        whole(self, dim=dim, pre=pre, trunk=trunk, per_level=per_level, bottleneck=bottleneck)
        whole(self, most=16, depth=depth)
        divides(self, bottleneck=bottleneck, dim=dim)
        flag(self, residual=residual)
        self.dim, self.mask, self.residual = dim, mask, residual
        self.pre, self.trunk = (
            nn.Sequential(*[Unit(dim, bottleneck=bottleneck) for _ in range(number)]) for number in (pre, trunk)
        )
        self.branch = (
            None if mask == "none" else BottomUpTopDown(dim, depth=depth, per_level=per_level, bottleneck=bottleneck)
        )
        self.post = Unit(dim, bottleneck=bottleneck)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions as He et al.; norms 1 and 0."""
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            elif isinstance(part, nn.BatchNorm2d):
                part.reset_parameters()

    def parts(self, x: Float[Tensor, "B C Y X"]) -> tuple[Tensor, Tensor | None]:
        """The trunk T, and the mask M where there is one."""
        t = self.pre(x)
        trunk: Tensor = self.trunk(t)
        if self.branch is None or self.mask == "none":
            return trunk, None
        return trunk, mask_values(self.branch(t), self.mask)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        trunk, mask = self.parts(x)
        out: Tensor = self.post(trunk if mask is None else soft_mask(trunk, mask, residual=self.residual))
        return out

    def extra_repr(self) -> str:
        return f"{self.dim}, mask={self.mask!r}, residual={self.residual}"
