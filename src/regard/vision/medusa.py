"""MEDUSA: one encoder-decoder looks at the image, and heads make a gate of it for every scale.

All scales so share what is seen of the whole, and each has its own view of it; no gate depends on the map that it
weighs. There are no queries and keys.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, fits, flag, refuse, whole
from regard.vision._shared import MapNorm, no_empty_map

CARD = Card(
    "medusa",
    equation="""S = body(image)                              a U-net, once an image
A_l = sigmoid(head_l(resize(S, Y_l x X_l)))  one gate for each pixel, or for each channel of it
x_l <- A_l . x_l  [+ x_l]                    for each scale l
body, level by level: h = relu(norm(conv(h))), max pool of 2 x 2; and back: h = relu(norm(conv([up(h) ; skip])))""",
    papers=(
        Paper(
            "MEDUSA: Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture for Medical Image "
            "Analysis",
            "Aboutalebi, Pavlova, Gunraj, Shafiee, Sabri, Alaref, Wong",
            2021,
            "2110.06063",
            "abstract",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost(
        "B*Y*X*(9*width*(M + 7*width*(levels - 1)/2) + width*global_channels"
        "+ kernel**2*global_channels*(1 + channels*(M - 1)))",
        "",
    ),
    claim="A single body, with heads for several scales: "
    "tests/vision/test_medusa.py::test_one_body_feeds_all_scales, "
    "tests/vision/test_medusa.py::test_gates_depend_on_the_image_alone.",
    differs=(
        "Only that there is a single encoder-decoder with heads for several scales was read; the layers of the body, "
        "the resize, the sigmoid and the product are recalled or inferred, and so is all that `defaults` calls ours.",
        "As a layer of one map, that map is the image, too; `MultiScaleGate` has an image and several maps.",
        "The head starts as torch's convolutions do, so that gates are about 1/2.",
    ),
    verified="reconstructed",
    exceptions={"L10 batch_rows_do_not_meet_in_training": "batch norms take all maps of a batch together in training"},
    example={"width": 4, "global_channels": 2},
    tries={"resize": ...},
    defaults={
        "width": "ours",
        "levels": "ours",
        "global_channels": "ours",
        "kernel": "ours",
        "channels": "ours, one gate for each pixel",
        "residual": "ours, as the account of it",
        "resize": "ours",
    },
)

Resize = Literal["bilinear", "area"]


class GlobalAttentionBody(nn.Module):
    """S: a U-net of one convolution a level on the way down and on the way up. (B, I, Y, X) -> (B, G, Y, X).

    Args:
        in_channels: I, of the image or an early map.
        widths: channels of each level; every one but the first has half the sides of the one before.
        out_channels: G.
    """

    def __init__(self, in_channels: int, *, widths: Sequence[int] = (16, 32, 64), out_channels: int = 1) -> None:
        super().__init__()
        whole(self, in_channels=in_channels, out_channels=out_channels, levels=len(widths))
        for width in widths:
            whole(self, widths=width)
        self.dim, self.widths = in_channels, tuple(widths)
        down = [_Level(a, b) for a, b in pairwise((in_channels, *widths))]
        up = [_Level(coarse + fine, fine) for fine, coarse in pairwise(widths)]
        self.encoder, self.decoder = nn.ModuleList(down), nn.ModuleList(up[::-1])
        self.out = nn.Conv2d(widths[0], out_channels, 1)

    @checked(I="dim")
    def forward(self, image: Float[Tensor, "B I Y X"]) -> Float[Tensor, "B G Y X"]:
        no_empty_map(self, image, 2 ** (len(self.widths) - 1))
        skips, h = [], image
        for n, level in enumerate(self.encoder):
            h = level(F.max_pool2d(h, 2) if n else h)
            skips.append(h)
        for level, skip in zip(self.decoder, skips[-2::-1], strict=True):
            h = level(torch.cat([_resized(h, skip.shape[2:], "bilinear"), skip], 1))
        return cast(Tensor, self.out(h))


class _Level(nn.Module):
    """relu(norm(conv(h)))."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, padding=1), MapNorm(outputs)

    def forward(self, h: Float[Tensor, "B I Y X"]) -> Float[Tensor, "B O Y X"]:
        return F.relu(self.norm(self.conv(h)))


def _resized(z: Float[Tensor, "B G Y X"], size: Sequence[int], how: Resize) -> Float[Tensor, "B G y x"]:
    """ "area" is the mean of what each pixel covers, where "bilinear" samples up to four pixels of it."""
    if z.shape[2:] == torch.Size(size):
        return z
    if how == "area":
        return F.adaptive_avg_pool2d(z, (size[0], size[1]))
    return F.interpolate(z, size=tuple(size), mode="bilinear", align_corners=False)


class ScaleHead(nn.Module):
    """A_l: what one scale makes of S, resized to it first.

    Args:
        global_channels: G.
        dim: how many gates a pixel has, 1 or the channels of the map.
        kernel: of its convolution, odd.
        resize: how S comes to the map's size; "area" reads all of it.
    """

    def __init__(self, global_channels: int, dim: int = 1, *, kernel: int = 3, resize: Resize = "bilinear") -> None:
        super().__init__()
        whole(self, global_channels=global_channels, dim=dim, kernel=kernel)
        choice(self, get_args(Resize), resize=resize)
        if kernel % 2 == 0:
            refuse(self, "kernel", "is even", kernel, "an odd one, which has a centre")
        self.resize: Resize = resize
        self.conv = nn.Conv2d(global_channels, dim, kernel, padding=kernel // 2)

    def forward(self, seen: Float[Tensor, "B G Y X"], size: Sequence[int]) -> Float[Tensor, "B dim y x"]:
        """The gate, in (0, 1), of a map of that (Y_l, X_l)."""
        return cast(Tensor, self.conv(_resized(seen, size, self.resize))).sigmoid()


class MultiScaleGate(nn.Module):
    """One body and a head for each scale: gates of maps by what is seen in the image.

    Args:
        body: makes S, (B, I, Y, X) -> (B, G, Y, X), of the image or of the stem's map; `GlobalAttentionBody`.
        dims: C_l, channels of the maps.
        global_channels: G.
        channels: whether each channel has a gate of its own, or each pixel one.
        residual: whether the map is added to what passes.
        kernel, resize: of the heads.
    """

    def __init__(
        self,
        body: nn.Module,
        dims: Sequence[int],
        *,
        global_channels: int = 1,
        kernel: int = 3,
        channels: bool = False,
        residual: bool = False,
        resize: Resize = "bilinear",
    ) -> None:
        super().__init__()
        flag(self, channels=channels, residual=residual)
        whole(self, scales=len(dims))
        for dim in dims:
            whole(self, dims=dim)
        self.body, self.dims, self.residual = body, tuple(dims), residual
        self.heads = nn.ModuleList(
            ScaleHead(global_channels, dim if channels else 1, kernel=kernel, resize=resize) for dim in dims
        )

    def prepare(
        self, image: Float[Tensor, "B I Y X"], sizes: Sequence[Sequence[int]]
    ) -> list[Float[Tensor, "B gates y x"]]:
        """The gates of maps of these (Y_l, X_l), for a network that makes its maps one after the other."""
        if len(sizes) != len(self.heads):
            refuse(self, "sizes", "are of another number of scales", len(sizes), f"{len(self.heads)}")
        seen = self.body(image)
        return [head(seen, size) for head, size in zip(self.heads, sizes, strict=True)]

    def apply_gate(self, x: Float[Tensor, "B C Y X"], gate: Float[Tensor, "B gates Y X"]) -> Float[Tensor, "B C Y X"]:
        """What passes of a map."""
        return gate * x + x if self.residual else gate * x

    def forward(
        self, image: Float[Tensor, "B I Y X"], maps: Sequence[Float[Tensor, "B C y x"]]
    ) -> list[Float[Tensor, "B C y x"]]:
        """All maps, each by its gate."""
        if len(maps) != len(self.dims):
            refuse(self, "maps", "are of another number of scales", len(maps), f"{len(self.dims)}")
        for n, (x, dim) in enumerate(zip(maps, self.dims, strict=True)):
            fits(self, "B C Y X", {"B": len(image), "C": dim}, **{f"maps[{n}]": x})
        gates = self.prepare(image, [x.shape[2:] for x in maps])
        return [self.apply_gate(x, gate) for x, gate in zip(maps, gates, strict=True)]


@CARD.module
class Medusa(nn.Module):
    """Both for one map, which is the image, too.

    Args:
        dim: C.
        width: channels of the body's first level; each further one has twice as many.
        levels: how many there are.
        global_channels: G, of what the body gives.
        kernel, channels, residual, resize: as for `MultiScaleGate`.
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int = 16,
        levels: int = 3,
        global_channels: int = 1,
        kernel: int = 3,
        channels: bool = False,
        residual: bool = False,
        resize: Resize = "bilinear",
    ) -> None:
        super().__init__()
        whole(self, width=width)
        whole(self, most=16, levels=levels)
        self.dim, widths = dim, [width * 2**n for n in range(levels)]
        self.gate = MultiScaleGate(
            GlobalAttentionBody(dim, widths=widths, out_channels=global_channels),
            (dim,),
            global_channels=global_channels,
            kernel=kernel,
            channels=channels,
            residual=residual,
            resize=resize,
        )

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        return cast(Tensor, self.gate(x, [x])[0])
