"""Deformable attention: each query samples a few points of its own choice from several feature maps."""

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, divides, number, refuse, whole
from regard.detection.places import Reads
from regard.detection.sampling import Sampling, deformable_attention, sampling_locations
from regard.masks import Mask
from regard.pipeline.tokens import key_padding
from regard.shapes import HeadShape
from regard.tracing import readable
from regard.weights import Loaded, same


def example_inputs(shape: HeadShape) -> tuple[Tensor, ...]:
    """Two batches of 12 queries, three maps, boxes around which to look."""
    generator = torch.Generator().manual_seed(5)
    shapes = torch.tensor([(4, 3), (2, 2), (1, 2)])
    x, context = (torch.randn(2, n, shape.dim, generator=generator, dtype=torch.float64) for n in (12, 18))
    reference = 0.2 + 0.6 * torch.rand(2, 12, 1, 4, generator=generator, dtype=torch.float64)
    return x, context, reference, shapes


CARD = Card(
    "deformable",
    equation="""weight = softmax over levels and points of W_a x;   off = W_off x         per head; no query-key product
point p of level l, (x, y) in [0, 1]:  loc = ref + off / (X_l, Y_l)       ref a point
                                       loc = centre + off / K_l * (w, h) / 2        ref a box
y = W_o concat over heads of (sum over l, p of weight * V_l(loc)),   V = W_v memory, bilinear, 0 outside the map""",
    papers=(
        Paper(
            "Deformable DETR: Deformable Transformers for End-to-End Object Detection",
            "Zhu et al.",
            2020,
            "2010.04159",
            "abstract; official code",
        ),
    ),
    protocol="CrossMixer",
    inputs=example_inputs,
    supports={"bidirectional", "padding", "compile"},
    traits={"nonnegative"},
    cost=Cost("3*B*T*H*num_levels*num_points*M", ""),
    claim="As good as DETR in a tenth of the epochs: a query reads at most 4 H sum(K) pixels, near its reference, "
    "however large the maps, and a detector learns faster than with plain cross-attention: "
    "tests/detection/test_deformable.py::test_reads_few_pixels_however_large_the_maps, "
    "tests/models/test_detector.py::test_learns_to_box_and_where_to_look_helps.",
    differs=("Maps with padding: scale the references by the valid part of each map before the call.",),
    verified="third-party",
    example={"num_levels": 3, "num_points": 2},
    tasks=("boxes",),
    defaults={"num_levels": "code", "num_points": "code"},
)


@CARD.module(closed=("points", "sampling", "offset_scale"))  # those are the options of a later paper's card
class DeformableAttention(nn.Module):
    """Attention of queries to a few points of feature maps.

    Args:
        dim, num_heads: M and H; the head width is dim / num_heads.
        num_levels: L, how many maps there are.
        num_points: how many points a head looks at on each level. 4 and 4 are the authors' defaults.
        points: K_l, those of each level, in place of the same number for all.
        sampling: "bilinear", or "discrete", which reads one pixel and moves no offsets in training.
        offset_scale: how many box widths an offset of K_l is, where references are boxes.
    """

    reads: tuple[Reads, ...] = ("reference", "shapes")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_levels: int = 4,
        num_points: int = 4,
        points: Sequence[int] | None = None,
        sampling: Sampling = "bilinear",
        offset_scale: float = 0.5,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points)
        divides(self, num_heads=num_heads, dim=dim)
        points = (num_points,) * num_levels if points is None else tuple(points)
        if not points:
            refuse(self, "points", "has no level", points, "a number for each level")
        for count in points:
            whole(self, points=count)
        choice(self, get_args(Sampling), sampling=sampling)
        number(self, offset_scale=offset_scale)
        self.dim, self.num_heads, self.num_levels, self.points = dim, num_heads, len(points), points
        self.sampling, self.offset_scale = sampling, offset_scale
        self.offset_proj = nn.Linear(dim, num_heads * sum(points) * 2)
        self.weight_proj = nn.Linear(dim, num_heads * sum(points))
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)
        self.offset_proj.requires_grad_(sampling == "bilinear")
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Heads look along as many rays, point k at distance k; all weights are equal."""
        for proj in (self.offset_proj, self.weight_proj):
            nn.init.zeros_(proj.weight)
        for proj in (self.v_proj, self.o_proj):
            nn.init.xavier_uniform_(proj.weight)
        for proj in (self.weight_proj, self.v_proj, self.o_proj):
            nn.init.zeros_(proj.bias)
        bias = self.offset_proj.bias
        angle = torch.arange(self.num_heads, device=bias.device, dtype=torch.float64) * (2 * math.pi / self.num_heads)
        ray = torch.stack([angle.cos(), angle.sin()], -1)
        ray = ray / ray.abs().amax(-1, keepdim=True)
        distance = torch.cat([torch.arange(1, n + 1, device=bias.device) for n in self.points])
        bias.copy_((ray[:, None] * distance[:, None]).flatten())

    @checked(M="dim", L="num_levels")
    def forward(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S M"],
        reference: Float[Tensor, "B T #L 2"] | Float[Tensor, "B T #L 4"],
        shapes: Int[Tensor, "L 2"] | Sequence,
        *,
        mask: Mask | Bool[Tensor, "B S"] | Bool[Tensor, "B 1 1 S"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """
        Args:
            x: queries, with their positions added.
            context: the maps' pixels, level by level, row by row.
            reference: points (x, y) or boxes (cx, cy, w, h) in [0, 1], for every level or one for all.
            shapes: (Y, X) of every level. A tensor on a GPU is checked against S at the cost of a synchronisation.
            mask: hides pixels of the context, which then are 0.
        """
        shapes = torch.as_tensor(shapes, device=x.device)
        self._make_up(shapes, context.shape[1])
        keep = key_padding(self, mask, context)
        if keep is None:
            value = self.v_proj(context)
        else:
            hidden = ~keep[..., None]
            value = self.v_proj(context.masked_fill(hidden, 0)).masked_fill(hidden, 0)
        # A pixel of a large map is less than bf16 can tell apart in [0, 1].
        wide = torch.promote_types(x.dtype, torch.float32)
        offsets = self.offset_proj(x).to(wide).unflatten(-1, (self.num_heads, -1, 2))
        weights = self.weight_proj(x).to(wide).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        locations = sampling_locations(reference.to(wide), offsets, shapes, self.points, offset_scale=self.offset_scale)
        value = value.unflatten(-1, (self.num_heads, -1))
        out = deformable_attention(value, shapes, locations, weights, self.points, sampling=self.sampling)
        return self.o_proj(out.flatten(2))

    @checked(L="num_levels")
    def _make_up(self, shapes: Int[Tensor, "L 2"], tokens: int) -> None:
        """Refuse maps that are not what the context is made of."""
        if readable(shapes) and (bool((shapes < 1).any()) or int(shapes.prod(-1).sum()) != tokens):
            refuse(self, "shapes", "don't make up the context", shapes.tolist(), f"maps of {tokens} tokens together")


NAMES = {
    "offset_proj": "sampling_offsets",
    "weight_proj": "attention_weights",
    "v_proj": "value_proj",
    "o_proj": "output_proj",
}
"""Ours, and theirs in transformers."""


@CARD.loads(
    "transformers",
    *("DeformableDetrMultiscaleDeformableAttention", "GroundingDinoMultiscaleDeformableAttention"),
    *("RTDetrMultiscaleDeformableAttention", "MMGroundingDinoMultiscaleDeformableAttention"),
)
def _transformers(theirs: Any) -> Loaded:
    sizes = {"num_levels": theirs.n_levels, "num_points": theirs.n_points}
    return Loaded(lambda: DeformableAttention(theirs.d_model, theirs.n_heads, **sizes), same(theirs, NAMES))
