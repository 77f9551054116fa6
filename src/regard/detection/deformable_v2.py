"""RT-DETRv2's deformable attention: as many points as each level needs, and sampling without interpolation.

    K_l points at level l;   boxes: loc = centre + off / K_l * (w, h) * offset_scale
    discrete: sample = V_l[row, column],  column = trunc(loc_x X_l + 1/2), row = trunc(loc_y Y_l + 1/2), both clamped

Lv et al. 2024, https://arxiv.org/abs/2407.17140: abstract read; follows the authors' code. All else, and the code, is
in `deformable.py` and `sampling.py`. Discrete sampling passes no gradient to offsets and references: as in the authors'
code the offsets are frozen then, so train with bilinear sampling first. It rounds half a pixel towards the lower right,
as theirs does.
"""

from regard._former import Card, Cost, Paper, register
from regard.detection.deformable import DeformableAttention, example_inputs, refuse
from regard.detection.sampling import Sampling
from regard.shapes import HeadShape


def _build(
    shape: HeadShape,
    *,
    causal: bool,
    num_levels: int = 3,
    points: int | tuple[int, ...] = 4,
    sampling: Sampling = "bilinear",
    offset_scale: float = 0.5,
) -> DeformableAttention:
    refuse("deformable_v2", shape, causal)
    points = (points,) * num_levels if isinstance(points, int) else tuple(points)
    if len(points) != num_levels:
        raise ValueError(f"deformable_v2: points has {len(points)} levels (got {points}); expected {num_levels}")
    return DeformableAttention(
        shape.dim,
        shape.num_heads,
        points=points,
        sampling=sampling,
        offset_scale=offset_scale,
    )


CARD = register(
    Card(
        name="deformable_v2",
        family="detection",
        gist="Deformable attention with points by level and sampling of single pixels.",
        equation="loc = centre + off / K_l * (w, h) * offset_scale;  discrete: V_l[trunc(loc * size + 1/2)]",
        paper=Paper(
            "RT-DETRv2: Improved Baseline with Bag-of-Freebies for Real-Time Detection Transformer",
            "Lv et al.",
            2024,
            "2407.17140",
            "abstract; official code",
        ),
        build=_build,
        protocol="CrossMixer",
        inputs=example_inputs,
        supports=frozenset({"bidirectional", "padding", "compile"}),
        traits=frozenset({"nonnegative"}),
        cost=Cost("(S + T)*M*M + T*H*num_levels*4*(3*M + 4*D)", ""),
        claim=(
            "Discrete sampling needs no grid_sample and reads a quarter of the pixels; points can differ by level: "
            "tests/detection/test_deformable.py."
        ),
        differs=(
            "Discrete sampling clamps rows and columns each by its own size, which the authors' code marks as to fix.",
        ),
        verified="third-party",
        example={"points": (2, 1, 3)},
        tasks=("boxes",),
    )
)
