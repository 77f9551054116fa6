"""Conditional cross-attention: content and place side by side in every head; the place is learnt."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, divides, refuse, whole
from regard.detection.places import Reads, sine_embedding
from regard.masks import Mask, padding
from regard.pipeline.function import attention
from regard.pipeline.tokens import key_padding
from regard.shapes import HeadShape
from regard.weights import Loaded, same


def _inputs(shape: HeadShape) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    x, context = (torch.randn(2, n, shape.dim, generator=generator, dtype=torch.float64) for n in (12, 7))
    reference, places = (torch.rand(2, n, 2, generator=generator, dtype=torch.float64) for n in (12, 7))
    return x, context, reference, sine_embedding(places, shape.dim)


CARD = Card(
    "conditional_cross",
    equation="""lambda = MLP(f);   p_q = lambda * sine(ref)        f: the decoder embedding; first layer: lambda = 1
query = [W_qc f ; W_qs p_q],   key = [W_kc memory ; W_kp pos]         side by side in every head, width 2 D
z = (content . content + spatial . spatial) / sqrt(2 D);   y = W_o concat over heads of softmax(z) W_v memory
first layer: W_qp qpos is added to the content query, and W_kp pos to the content key""",
    papers=(
        Paper(
            "Conditional DETR for Fast Training Convergence",
            "Meng et al.",
            2021,
            "2108.06152",
            "abstract; official code",
        ),
    ),
    protocol="CrossMixer",
    inputs=_inputs,
    supports={"bidirectional", "padding", "compile"},
    traits={"normalised", "nonnegative"},
    cost=Cost("B*(3*T + S)*M*M + 3*B*T*S*M", ""),
    claim="The place alone finds the region, and training is 6.7 to 10 times shorter. In small: a head attends near "
    "its reference, and a detector learns faster than with plain cross-attention: "
    "tests/detection/test_conditional.py::test_the_place_alone_finds_the_reference, "
    "tests/models/test_detector.py::test_learns_to_box_and_where_to_look_helps.",
    differs=(
        "The transform, the MLP, belongs to the layer; assign one module to all layers to share it as the paper does.",
        "No dropout of the weights.",
    ),
    verified="third-party",
    tasks=("boxes",),
)


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


@CARD.module(closed=("first",))  # the first layer is called with query positions too
class ConditionalCrossAttention(nn.Module):
    """Cross-attention of a decoder layer of Conditional DETR.

    Args:
        dim, num_heads: M and H; the head width is dim / num_heads, twice that for queries and keys.
        first: built for the first layer, which takes query positions and has no transform.
    """

    reads: tuple[Reads, ...] = ("point", "place")

    def __init__(self, dim: int, num_heads: int, *, first: bool = False) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads)
        divides(self, num_heads=num_heads, dim=dim)
        if dim % 2:
            refuse(self, "dim", "is odd", dim, "an even one, for sines and cosines")
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

    @checked(M="dim")
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
        if (query_pos is not None) != self.first:
            got = "none" if query_pos is None else tuple(query_pos.shape)
            expected = f"{'some' if self.first else 'none'}, as first={self.first}"
            refuse(self, "query_pos", "belongs to the first layer, and only there", got, expected)
        if state is not None and self.first:
            refuse(self, "state", "is of no use to the first layer", tuple(state.shape), "none: it has no transform")
        keep = key_padding(self, mask, context)
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


@CARD.loads("transformers", "ConditionalDetrDecoderCrossAttention")
def _transformers(theirs: Any) -> Loaded:
    """Of the first layer: what later ones multiply their sines by is one MLP of the whole decoder."""
    if theirs.q_pos_proj is None:
        refuse(theirs, "q_pos_proj", "is none, so that this is a later layer", None, "the decoder's first layer")
    own = {"q_proj": "q_content_proj", "k_proj": "k_content_proj", "v_proj": "v_proj", "o_proj": "o_proj"}
    places = {"q_spatial_proj": "q_pos_sine_proj", "k_spatial_proj": "k_pos_proj", "q_pos_proj": "q_pos_proj"}
    dim, heads = theirs.hidden_size, theirs.num_attention_heads
    return Loaded(lambda: ConditionalCrossAttention(dim, heads, first=True), same(theirs, own | places))
