"""Conditional cross-attention: a decoder query looks for content, and for places near its reference point.

    lambda = MLP(f);   p_q = lambda * sine(ref)                   f: the decoder embedding; first layer: lambda = 1
    query = [W_qc f ; W_qs p_q],   key = [W_kc memory ; W_kp pos]         side by side in every head, width 2 D
    z = (content . content + spatial . spatial) / sqrt(2 D);   y = W_o concat over heads of softmax(z) W_v memory
    first layer: W_qp qpos is added to the content query, and W_kp pos to the content key

Meng et al. 2021, https://arxiv.org/abs/2108.06152: abstract read; follows the authors' code.
Differs from the paper: the MLP belongs to the layer (assign one to the `transform` of all layers to share it).
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard._former import Card, Cost, Paper, register
from regard.checks import tokens as check_tokens
from regard.detection.deformable import refuse
from regard.masks import Mask, padding
from regard.pipeline.function import attention
from regard.pipeline.tokens import key_padding
from regard.shapes import HeadShape


def sine_embedding(
    points: Float[Tensor, "*b 2"], dim: int, *, temperature: float = 10000.0
) -> Float[Tensor, "*b {dim}"]:
    """(x, y) in [0, 1] as dim / 2 sines and cosines of y, then as many of x, in at least fp32."""
    n = dim // 2
    wide = torch.promote_types(points.dtype, torch.float32)
    j = torch.arange(n, device=points.device)
    angle = 2 * math.pi * points.flip(-1)[..., None].to(wide) / temperature ** ((2 * (j // 2)).to(wide) / n)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).flatten(-2)


def conditional_attention(
    content_q: Float[Tensor, "B H T D"],
    spatial_q: Float[Tensor, "B H T D"],
    content_k: Float[Tensor, "B H S D"],
    spatial_k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S D"],
    *,
    mask: Mask | None = None,
) -> Float[Tensor, "B H T D"]:
    """Softmax attention with content and place side by side in each head."""
    q, k = torch.cat([content_q, spatial_q], -1), torch.cat([content_k, spatial_k], -1)
    return attention(q, k, v, mask=mask)


class ConditionalCrossAttention(nn.Module):
    """Cross-attention of a decoder layer of Conditional DETR.

    Args:
        dim, num_heads: M and H; the head width is dim / num_heads, twice that for queries and keys.
        first: built for the first layer, which takes query positions and has no transform.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        first: bool = False,
    ) -> None:
        super().__init__()
        if dim % num_heads or dim % 2:
            raise ValueError(
                f"ConditionalCrossAttention: dim {dim} must be even and a multiple of num_heads {num_heads}"
            )
        self.dim, self.num_heads, self.first = dim, num_heads, first
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)
        self.q_spatial_proj = nn.Linear(dim, dim)
        self.k_spatial_proj = nn.Linear(dim, dim)
        self.q_pos_proj = nn.Linear(dim, dim) if first else None
        mlp = (nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.transform = None if first else nn.Sequential(*mlp)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier's uniform for weights; the output's bias starts at 0, the others as torch has them."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                part.reset_parameters()
                nn.init.xavier_uniform_(part.weight)
        nn.init.zeros_(self.o_proj.bias)

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S M"],
        reference: Float[Tensor, "B T 2"],
        context_pos: Float[Tensor, "B S M"],
        *,
        query_pos: Float[Tensor, "B T M"] | None = None,
        state: Float[Tensor, "B T M"] | None = None,
        mask: Mask | Bool[Tensor, "B S"] | Bool[Tensor, "B 1 1 S"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """
        Args:
            x: the decoder embedding (after self-attention).
            context: what to look at, such as a map's pixels.
            reference: the point (x, y) in [0, 1] near which each query looks.
            context_pos: embedding of the places of context, such as `sine_embedding` of the pixels.
            query_pos: the object queries; in the first layer, and only there.
            state: the decoder embedding that the transform reads, if not x (the paper: as it entered the layer).
            mask: hides keys.
        """
        self._check(x, context, reference, context_pos, query_pos, state)
        keep = key_padding("ConditionalCrossAttention", mask, context)
        if keep is not None:
            context, context_pos = (z.masked_fill(~keep[..., None], 0) for z in (context, context_pos))
        spatial = sine_embedding(reference, self.dim)
        if self.transform is not None:
            spatial = self.transform(x if state is None else state) * spatial
        content_q, content_k, place = self.q_proj(x), self.k_proj(context), self.k_spatial_proj(context_pos)
        if self.q_pos_proj is not None:
            content_q, content_k = content_q + self.q_pos_proj(query_pos), content_k + place
        parts = (content_q, self.q_spatial_proj(spatial.to(x.dtype)), content_k, place, self.v_proj(context))
        heads = (z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in parts)
        out = conditional_attention(*heads, mask=None if keep is None else padding(keep))
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _check(
        self,
        x: Tensor,
        context: Tensor,
        reference: Tensor,
        context_pos: Tensor,
        query_pos: Tensor | None,
        state: Tensor | None,
    ) -> None:
        who = "ConditionalCrossAttention"
        check_tokens(who, "x", x, self.dim)
        check_tokens(who, "context", context, self.dim)
        if x.shape[0] != context.shape[0]:
            raise ValueError(f"{who}: x has batch {x.shape[0]} and context {context.shape[0]}; they must match")
        if (query_pos is not None) != self.first:
            raise ValueError(
                f"{who}: query_pos belongs to the first layer, and only there (this one: first={self.first})"
            )
        if state is not None and self.first:
            raise ValueError(f"{who}: the first layer has no transform, so no use for state")
        for name, z, shape in (
            ("reference", reference, (*x.shape[:2], 2)),
            ("context_pos", context_pos, context.shape),
            ("query_pos", query_pos, x.shape),
            ("state", state, x.shape),
        ):
            if z is not None and z.shape != shape:
                raise ValueError(f"{who}: {name} has shape {tuple(z.shape)}; expected {tuple(shape)}")


def _build(
    shape: HeadShape,
    *,
    causal: bool,
) -> ConditionalCrossAttention:
    refuse("conditional_cross", shape, causal)
    return ConditionalCrossAttention(shape.dim, shape.num_heads)


def _inputs(shape: HeadShape) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    x, context = (torch.randn(2, n, shape.dim, generator=generator, dtype=torch.float64) for n in (12, 7))
    reference, places = (torch.rand(2, n, 2, generator=generator, dtype=torch.float64) for n in (12, 7))
    return x, context, reference, sine_embedding(places, shape.dim)


CARD = register(
    Card(
        name="conditional_cross",
        family="detection",
        gist="Decoder cross-attention with content and place side by side; the place is learnt.",
        equation="z = (W_qc f . W_kc m + W_qs (MLP(f) * sine(ref)) . W_kp pos) / sqrt(2 D);  y = softmax(z) W_v m",
        paper=Paper(
            "Conditional DETR for Fast Training Convergence",
            "Meng et al.",
            2021,
            "2108.06152",
            "abstract; official code",
        ),
        build=_build,
        protocol="CrossMixer",
        inputs=_inputs,
        supports=frozenset({"bidirectional", "padding", "compile"}),
        traits=frozenset({"normalised", "nonnegative"}),
        cost=Cost("(5*T + 3*S)*M*M + 3*T*S*M", ""),
        claim=(
            "The place alone finds the region: heads attend to bands near the reference, and training is 6.7 to 10 "
            "times shorter. In small: tests/detection/test_conditional.py; tests/models/test_detector.py trains it."
        ),
        differs=(
            "The transform belongs to the layer; assign one module to all layers to share it as the paper does.",
            "No dropout of the weights.",
        ),
        verified="third-party",
        tasks=("boxes",),
    )
)
