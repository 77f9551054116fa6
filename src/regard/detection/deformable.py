"""Multi-scale deformable attention: a query looks at a few points, which it chooses itself, of several feature maps.

    weight = softmax over levels and points of W_a x;   off = W_off x                   per head; no query-key product
    point p of level l, (x, y) in [0, 1]:  loc = ref + off / (X_l, Y_l)                 ref a point
                                           loc = centre + off / K_l * (w, h) / 2        ref a box
    y = W_o concat over heads of (sum over l, p of weight * V_l(loc)),   V = W_v memory, bilinear, 0 outside the map
    time O(T H sum(K) D) beside the projections, whatever the maps' sizes

Zhu et al. 2020, https://arxiv.org/abs/2010.04159: abstract read; follows the authors' code. RT-DETRv2's options are
described in `deformable_v2.py`; the sampling of both is in `sampling.py`.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard._former import Card, Cost, Paper, register
from regard.checks import tokens as check_tokens
from regard.detection.sampling import Sampling, deformable_attention, sampling_locations
from regard.masks import Mask
from regard.pipeline.tokens import key_padding
from regard.shapes import HeadShape


class DeformableAttention(nn.Module):
    """Attention of queries to a few points of feature maps.

    Args:
        dim, num_heads: M and H; the head width is dim / num_heads.
        points: K_l, how many points a head looks at on each level.
        sampling: "bilinear", or "discrete", which reads one pixel and moves no offsets in training.
        offset_scale: how many box widths an offset of K_l is, where references are boxes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        points: Sequence[int] = (4, 4, 4, 4),
        sampling: Sampling = "bilinear",
        offset_scale: float = 0.5,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"DeformableAttention: dim {dim} is not a multiple of num_heads {num_heads}")
        if not points or min(points) < 1:
            raise ValueError(f"DeformableAttention: every level needs at least 1 point (got {tuple(points)})")
        if sampling not in ("bilinear", "discrete"):
            raise ValueError(f"DeformableAttention: unknown sampling {sampling!r}; expected 'bilinear' or 'discrete'")
        self.dim, self.num_heads, self.points = dim, num_heads, tuple(points)
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

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S M"],
        reference: Float[Tensor, "B T #L R"],
        shapes: Int[Tensor, "L 2"] | Sequence[tuple[int, int]],
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
        self._check(x, context, reference, shapes)
        keep = key_padding("DeformableAttention", mask, context)
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

    def _check(self, x: Tensor, context: Tensor, reference: Tensor, shapes: Tensor) -> None:
        who, L = "DeformableAttention", len(self.points)
        check_tokens(who, "x", x, self.dim)
        check_tokens(who, "context", context, self.dim)
        (B, T), (N, S) = x.shape[:2], context.shape[:2]
        if B != N:
            raise ValueError(f"{who}: x has batch {B} and context {N}; they must match")
        if reference.shape not in {(B, T, n, r) for n in (1, L) for r in (2, 4)}:
            raise ValueError(
                f"{who}: reference has shape {tuple(reference.shape)}; expected ({B}, {T}, 1 or {L} levels, 2 or 4)"
            )
        if shapes.shape != (L, 2) or shapes.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{who}: shapes is {shapes.dtype} {tuple(shapes.shape)}; expected integers (Y, X) of {L} levels"
            )
        if torch.compiler.is_compiling() or shapes.is_meta:
            return
        if bool((shapes < 1).any()) or int(shapes.prod(-1).sum()) != S:
            raise ValueError(f"{who}: shapes {shapes.tolist()} don't make up the {S} tokens of the context")


def refuse(name: str, shape: HeadShape, causal: bool) -> None:
    """Raises for what no mechanism of this room can do."""
    if causal:
        raise ValueError(f"{name}: queries and pixels share no order in time (got causal=True)")
    if shape.num_kv_heads != shape.num_heads or shape.head_dim * shape.num_heads != shape.dim:
        raise ValueError(
            f"{name}: needs num_kv_heads == num_heads and head_dim == dim / num_heads (got {shape.num_kv_heads} key "
            f"heads of width {shape.head_dim} for {shape.num_heads} heads, dim {shape.dim}), no gqa"
        )


def example_inputs(shape: HeadShape) -> tuple[Tensor, ...]:
    """Two batches of 12 queries, three maps, boxes around which to look."""
    generator = torch.Generator().manual_seed(5)
    shapes = torch.tensor([(4, 3), (2, 2), (1, 2)])
    x, context = (torch.randn(2, n, shape.dim, generator=generator, dtype=torch.float64) for n in (12, 18))
    reference = 0.2 + 0.6 * torch.rand(2, 12, 1, 4, generator=generator, dtype=torch.float64)
    return x, context, reference, shapes


def _build(
    shape: HeadShape,
    *,
    causal: bool,
    num_levels: int = 4,
    num_points: int = 4,
) -> DeformableAttention:
    refuse("deformable", shape, causal)
    return DeformableAttention(shape.dim, shape.num_heads, points=(num_points,) * num_levels)


CARD = register(
    Card(
        name="deformable",
        family="detection",
        gist="Each query samples a few points of its own choice from several feature maps.",
        equation="y = sum over levels, points of softmax(W_a x) V_l(ref + W_off x / (X_l, Y_l)), V_l bilinear",
        paper=Paper(
            "Deformable DETR: Deformable Transformers for End-to-End Object Detection",
            "Zhu et al.",
            2020,
            "2010.04159",
            "abstract; official code",
        ),
        build=_build,
        protocol="CrossMixer",
        inputs=example_inputs,
        supports=frozenset({"bidirectional", "padding", "compile"}),
        traits=frozenset({"nonnegative"}),
        cost=Cost("(S + T)*M*M + T*H*num_levels*num_points*(3*M + 4*D)", ""),
        claim=(
            "As good as DETR in a tenth of the epochs: a query reads at most 4 H sum(K) pixels, near its reference, "
            "however large the maps: tests/detection/test_deformable.py; tests/models/test_detector.py trains it."
        ),
        differs=("Maps with padding: scale the references by the valid part of each map before the call.",),
        verified="third-party",
        example={"num_levels": 3, "num_points": 2},
        tasks=("boxes",),
    )
)
