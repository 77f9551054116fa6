"""RT-DETRv2's deformable attention: points by level, and sampling of single pixels."""

from collections.abc import Sequence
from typing import Any

import torch

from regard.cards import Card, Cost, Paper
from regard.checks import refuse, whole
from regard.detection.deformable import NAMES, DeformableAttention, example_inputs
from regard.detection.sampling import Sampling
from regard.weights import Loaded, Move, same

CARD = Card(
    "deformable_v2",
    equation="""as deformable, with K_l points at level l;   boxes: loc = centre + off / K_l * (w, h) * offset_scale
discrete: sample = V_l[row, column],  column = trunc(loc_x X_l + 1/2), row = trunc(loc_y Y_l + 1/2), both clamped""",
    papers=(
        Paper(
            "RT-DETRv2: Improved Baseline with Bag-of-Freebies for Real-Time Detection Transformer",
            "Lv et al.",
            2024,
            "2407.17140",
            "abstract; official code",
        ),
    ),
    protocol="CrossMixer",
    inputs=example_inputs,
    supports={"bidirectional", "padding", "compile"},
    traits={"nonnegative"},
    cost=Cost("3*B*T*H*num_levels*4*M", ""),
    claim="Discrete sampling needs no grid_sample and reads a quarter of the pixels: "
    "tests/detection/test_deformable.py::test_reads_few_pixels_however_large_the_maps.",
    differs=(
        "Discrete sampling clamps rows and columns each by its own size, which the authors' code marks as to fix.",
    ),
    verified="third-party",
    example={"points": (2, 1, 3)},
    tasks=("boxes",),
    defaults={"num_levels": "code", "points": "code", "sampling": "code", "offset_scale": "code"},
)


@CARD.module
class DeformableAttentionV2(DeformableAttention):
    """Attention of queries to a few points of feature maps, more on some than on others.

    Discrete sampling passes no gradient to offsets and references, and the offsets are frozen then: train with bilinear
    sampling first. It rounds half a pixel towards the lower right. All of it is as in the authors' code.

    Args:
        dim, num_heads: M and H; the head width is dim / num_heads.
        num_levels: L, how many maps there are.
        points: K_l, how many points a head looks at on each level; one number is for every level. 3 levels
            and 4 points are the authors' defaults.
        sampling, offset_scale: as of `DeformableAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_levels: int = 3,
        points: int | Sequence[int] = 4,
        sampling: Sampling = "bilinear",
        offset_scale: float = 0.5,
    ) -> None:
        whole(self, num_levels=num_levels)
        points = (points,) * num_levels if isinstance(points, int) else tuple(points)
        if len(points) != num_levels:
            refuse(self, "points", "has another number of levels", points, f"{num_levels} numbers")
        super().__init__(dim, num_heads, points=points, sampling=sampling, offset_scale=offset_scale)


@CARD.loads("transformers", "RTDetrV2MultiscaleDeformableAttention")
def _transformers(theirs: Any) -> Loaded:
    def build() -> DeformableAttentionV2:
        sampling: Sampling = "discrete" if theirs.method == "discrete" else "bilinear"
        options = {"points": tuple(theirs.n_points_list), "offset_scale": theirs.offset_scale}
        return DeformableAttentionV2(
            theirs.d_model, theirs.n_heads, num_levels=theirs.n_levels, sampling=sampling, **options
        )

    share = [1 / n for n in theirs.n_points_list for _ in range(n)]
    scale = Move((), ("n_points_scale",), lambda t: [], lambda: [torch.tensor(share)])
    return Loaded(build, [*same(theirs, NAMES), scale])
