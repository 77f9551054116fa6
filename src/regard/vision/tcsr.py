"""TCSR's block: neighborhood attention, and a feed-forward whose hidden channels move."""

from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, flag, number, whole
from regard.vision.neighborhood import NeighborhoodAttention
from regard.vision.shift import shift
from regard.vision.super_resolution import MapNorm, PixelShuffle, SuperResolution

PAPERS = (
    Paper(
        "Incorporating Transformer Designs into Convolutions for Lightweight Image Super-Resolution",
        "Wu, Jiang, Bai, Liu",
        2023,
        "2303.14324",
        "abstract; beginning of the introduction; the authors' repository has no code",
    ),
)
OPEN = (
    "The abstract says that neighborhood attention stands in the convolution's place, and a spatial shift without "
    "parameters in the feed-forward. Inferred are norms and residuals, that the shift stands between the two maps, one "
    "activation (on which side of the shift makes no difference), the directions and number of the shift's groups, its "
    "step, and that the maps have no bias.",
)

BLOCK = Card(
    "tcsr",
    equation="""x = x + NA(norm x)      neighborhood attention: w x w keys around each pixel, moved inward at borders
x = x + W2 shift(gelu(W1 norm(x)))      the shift is that of `shift_feed_forward`""",
    papers=PAPERS,
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("2*B*Y*X*M*(window**2 + mlp_ratio*M)", ""),
    claim="A large window at parameters that hardly grow with it, where a convolution's are quadratic: "
    "tests/vision/test_tcsr.py::test_a_large_window_costs_few_weights.",
    differs=OPEN,
    verified="reconstructed",
    example={"window": 3},
    tries={"n_div": 4},
    defaults={
        "window": "ours, recalled as the paper's largest",
        "relative": "ours, as in the neighborhood attention transformer",
        "mlp_ratio": "ours, recalled",
        "step": "ours",
        "n_div": "ours, so that some channels stay",
        "eps": "ours, as in code of the same authors' next network",
        "small_maps": "ours, as `NeighborhoodAttention`",
    },
)

FEED_FORWARD = Card(
    "shift_feed_forward",
    equation="""y = W2 shift(gelu(W1 x))      W1 1 x 1, C to r C;   W2 back
shift: groups of r C // n_div channels move by `step` pixels left, right, up, down; the rest stays; zeros come in""",
    papers=PAPERS,
    gist="TCSR's feed-forward (EFFN): hidden channels move by a pixel between the two maps.",
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("2*B*Y*X*M**2*ratio", ""),
    claim="It mixes neighbours without a parameter for it: "
    "tests/vision/test_tcsr.py::test_a_pixel_reaches_its_neighbours_without_parameters.",
    differs=OPEN,
    verified="reconstructed",
    tries={"n_div": 4},
    defaults={
        "ratio": "ours, recalled",
        "step": "ours",
        "n_div": "ours, so that some channels stay",
        "activations": "ours, inferred",
        "bias": "ours, inferred",
    },
)


def shift_feed_forward(
    x: Float[Tensor, "B C Y X"],
    up: tuple[Float[Tensor, "E C 1 1"], Float[Tensor, " E"] | None],
    down: tuple[Float[Tensor, "C E 1 1"], Float[Tensor, " C"] | None],
    *,
    step: int = 1,
    n_div: int = 5,
    activations: Literal[1, 2] = 1,
) -> Float[Tensor, "B C Y X"]:
    """W2 shift(gelu(W1 x)), with weight and bias of both maps; the rest as for `ShiftFeedForward`."""
    h = shift(F.gelu(F.conv2d(x, *up)), n_div=n_div, step=step)
    return F.conv2d(h if activations == 1 else F.gelu(h), *down)


@FEED_FORWARD.module
class ShiftFeedForward(nn.Module):
    """`shift_feed_forward` with its two maps.

    Args:
        dim: C.
        ratio: r, of hidden channels to C.
        step: how far channels move.
        n_div: 4 / n_div of the hidden channels move; from 4, where all do.
        activations: one GELU, or one on each side of the shift. On which side the one is makes no difference: it
            leaves the zeros that come in.
        bias: of the maps.
    """

    def __init__(
        self,
        dim: int,
        *,
        ratio: int = 2,
        step: int = 1,
        n_div: int = 5,
        activations: Literal[1, 2] = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, ratio=ratio, step=step)
        whole(self, 4, most=dim * ratio, n_div=n_div)
        choice(self, (1, 2), activations=activations)
        flag(self, bias=bias)
        self.dim, self.step, self.n_div = dim, step, n_div
        self.activations: Literal[1, 2] = activations
        self.up, self.down = nn.Conv2d(dim, ratio * dim, 1, bias=bias), nn.Conv2d(ratio * dim, dim, 1, bias=bias)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        maps = ((conv.weight, conv.bias) for conv in (self.up, self.down))
        how: dict[str, Any] = {"step": self.step, "n_div": self.n_div, "activations": self.activations}
        return shift_feed_forward(x, *maps, **how)

    def extra_repr(self) -> str:
        return f"{self.dim}, step={self.step}, n_div={self.n_div}, activations={self.activations}"


@BLOCK.module
class TCSRBlock(nn.Module):
    """Neighborhood attention and the feed-forward, each on what is normalised, and added.

    Args:
        dim, num_heads: as for `NeighborhoodAttention`.
        window: w, odd, of both axes.
        relative: whether differences of place have a learned bias.
        small_maps: "refuse" those that the window does not fit, or "pad" them with zeros that are attended to.
        mlp_ratio, step, n_div: of the feed-forward, r, step and n_div.
        eps: of the norms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 13,
        relative: bool = True,
        small_maps: Literal["refuse", "pad"] = "refuse",
        mlp_ratio: int = 2,
        step: int = 1,
        n_div: int = 5,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        number(self, above=0, eps=eps)
        self.dim = dim
        self.norms = nn.ModuleList(MapNorm(dim, eps=eps) for _ in range(2))
        self.attention = NeighborhoodAttention(dim, num_heads, window=window, relative=relative, small_maps=small_maps)
        self.feed_forward = ShiftFeedForward(dim, ratio=mlp_ratio, step=step, n_div=n_div)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        for norm, branch in zip(self.norms, (self.attention, self.feed_forward), strict=True):
            x = x + branch(norm(x))
        return x


def tcsr(
    *,
    dim: int = 48,
    num_heads: int = 4,
    window: int = 13,
    blocks: int = 8,
    scale: int = 4,
    channels: int = 3,
) -> SuperResolution:
    """A network of such blocks; its sizes are ours.

    Args:
        dim, num_heads, window: as for `TCSRBlock`.
        blocks: how many.
        scale: of the enlargement.
        channels: of the images.
    """
    made = [TCSRBlock(dim, num_heads, window=window) for _ in range(blocks)]
    upsampler = PixelShuffle(dim, channels=channels, scale=scale)
    return SuperResolution(nn.Sequential(*made), upsampler, dim=dim, channels=channels, scale=scale)
