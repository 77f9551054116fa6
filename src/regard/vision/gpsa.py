"""Gated positional self-attention (ConViT): heads start as taps of a convolution, and may leave."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, divides, flag, number, whole
from regard.pipeline.function import attention
from regard.vision.maps import to_map, to_tokens

CARD = Card(
    "gpsa",
    equation="""A_h = (1 - g_h) softmax_j(q_i . k_j / sqrt(D)) + g_h softmax_j(w_h . r_ij),   g_h = sigmoid(gate_h)
r_ij = (dx, dy, dx^2 + dy^2) from pixel i to pixel j,   y_i = concat_h(sum_j A_h[i,j] v_j) W_o
at the start w_h = locality (2 cx, 2 cy, -1): a Gaussian around the offset (cx, cy), another for each head""",
    papers=(
        Paper(
            "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
            "d'Ascoli, Touvron, Leavitt, Morcos, Biroli, Sagun",
            2021,
            "2103.10697",
            "official code; eqs. 1-7 of sections 1-3 by an account of them",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("2*B*Y*X*Y*X*M + B*Y*X*(Y+X)*M", ""),
    claim="With closed gates it is a convolution, with open ones attention by content: "
    "tests/vision/test_gpsa.py::test_is_a_convolution_or_attention_by_its_gates.",
    differs=(
        "The softmax of places is one of rows times one of columns, since its logits are a sum of both: no map of all "
        "pairs is formed for it. It has none of the bias b_h that cancels in it.",
        "Maps of any sides, as they come; the code takes N tokens to be of a square.",
        "Weights aren't divided by their sum, which is 1.",
        "Left out: dropout of the weights, which are never formed; the code's default is none.",
        "Queries and keys have a projection each, which the code stacks.",
    ),
    verified="third-party",
    example={"locality": 0.5},
    defaults={"locality": "code", "bias": "code"},
)


def axis_weights(size: int, slope: Float[Tensor, " H"], curve: Float[Tensor, " H"]) -> Float[Tensor, "H size size"]:
    """softmax over j of slope (j - i) + curve (j - i)^2, in at least float32."""
    wide = torch.promote_types(slope.dtype, torch.float32)
    at = torch.arange(size, device=slope.device, dtype=wide)
    offset = at - at[:, None]
    logits = slope.to(wide)[:, None, None] * offset + curve.to(wide)[:, None, None] * offset.square()
    return logits.softmax(-1)


@checked()
def by_place(v: Float[Tensor, "B H Y X V"], places: Float[Tensor, "H 3"]) -> Float[Tensor, "B H Y X V"]:
    """What attention by places alone gives: sum_j softmax_j(w_h . r_ij) v_j.

    Args:
        places: w_h, of the offsets dx and dy and of their squares' sum.
    """
    across, down, curve = places.unbind(-1)
    rows, columns = axis_weights(v.shape[2], down, curve), axis_weights(v.shape[3], across, curve)
    wide = v.to(rows.dtype)
    found = (rows @ wide.flatten(3)).unflatten(-1, wide.shape[3:])
    return (columns[:, None] @ found).to(v.dtype)


@checked()
def gated_positional_attention(
    q: Float[Tensor, "B H Y X D"],
    k: Float[Tensor, "B H Y X D"],
    v: Float[Tensor, "B H Y X V"],
    places: Float[Tensor, "H 3"],
    gate: Float[Tensor, " H"],
) -> Float[Tensor, "B H Y X V"]:
    """Attention by content and by place, each normalised by itself, mixed by the sigmoid of each head's gate."""
    content = attention(*(z.flatten(2, 3) for z in (q, k, v))).unflatten(2, v.shape[2:4])
    share = gate.to(torch.promote_types(gate.dtype, torch.float32)).sigmoid()[:, None, None, None]
    return ((1 - share) * content + share * by_place(v, places)).to(v.dtype)


def local_places(heads: int, locality: float = 1.0) -> Float[Tensor, "taps 3"]:
    """w_h of the first k^2 heads, k = floor(sqrt(heads)): one for each offset of a k x k kernel, dy running fastest.

    Args:
        locality: the precision of the Gaussians around the offsets; infinity would be a convolution.
    """
    whole("local_places", heads=heads)
    number("local_places", above=0, locality=locality)
    side = math.isqrt(heads)
    tap = torch.arange(side) - (side - 1) / 2
    cx, cy = torch.meshgrid(tap, tap, indexing="ij")
    return locality * torch.stack([2 * cx, 2 * cy, -torch.ones_like(cx)], -1).flatten(0, 1)


@CARD.module
class GatedPositionalSelfAttention(nn.Module):
    """`gated_positional_attention` with projections. All gates start at 1, so that 0.73 of each head goes by place.

    Args:
        dim, num_heads: M and H; heads beyond the largest square start anywhere.
        locality: how sharply heads start at offsets of their own, values being the tokens themselves; None starts all
            at random, as the paper's ablation.
        bias: of queries, keys and values.
    """

    def __init__(self, dim: int, num_heads: int, *, locality: float | None = 1.0, bias: bool = False) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads)
        divides(self, num_heads=num_heads, dim=dim)
        flag(self, bias=bias)
        if locality is not None:
            number(self, above=0, locality=locality)
        self.dim, self.num_heads, self.locality = dim, num_heads, locality
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.o_proj = nn.Linear(dim, dim)
        self.places = nn.Parameter(torch.empty(num_heads, 3))
        self.gate = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Truncated normal of 0.02 and no bias, as the authors' code, but for what starts local."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.trunc_normal_(self.places, std=0.02)
        nn.init.ones_(self.gate)
        if self.locality is not None:
            nn.init.eye_(self.v_proj.weight)
            first = local_places(self.num_heads, self.locality)
            self.places.mul_(self.locality)[: len(first)] = first.to(self.places)

    @checked(M="dim")
    def forward(self, x: Float[Tensor, "B M Y X"]) -> Float[Tensor, "B M Y X"]:
        tokens, sizes = to_tokens(x), x.shape[2:]
        q, k, v = (
            f(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).unflatten(2, sizes)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = gated_positional_attention(q, k, v, self.places, self.gate)
        return to_map(self.o_proj(out.flatten(2, 3).transpose(1, 2).flatten(2)), sizes)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, locality={self.locality}"
