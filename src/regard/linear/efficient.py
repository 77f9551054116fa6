"""Efficient attention: queries are normalised over features, keys over positions; k^T v comes first."""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import choice
from regard.kernels.check import check_inputs
from regard.linear._shared import repeat_heads
from regard.normalizers.softmax import softmax
from regard.pipeline.head_mixer import HeadMixer

CARD = Card(
    "efficient",
    equation="""out = rho_q(q) (rho_k(k)^T v)
softmax:  rho_q = softmax over the D features of a token,   rho_k = softmax over the S positions of a feature
scaling:  rho_q = q / sqrt(S),   rho_k = k / sqrt(S):   the same as (q k^T / S) v, in another order""",
    papers=(
        Paper(
            "Efficient Attention: Attention with Linear Complexities",
            "Shen et al.",
            2021,
            "1812.01243",
            "abstract; the authors' code; the scaling form is from the claim of equality",
        ),
    ),
    supports={"bidirectional", "padding", "packed", "cross", "gqa", "compile"},
    traits=PLAIN,
    cost=Cost("B*H*(T + S)*D*V", ""),
    claim="Linear in length, and with scaling equal to dot-product attention: "
    "tests/linear/test_efficient.py::test_no_square_matrix, "
    "tests/linear/test_efficient.py::test_scaling_is_dot_product_attention.",
    differs=(
        "Several heads, as in the authors' code; the paper has one.",
        "The residual of the authors' module belongs to the model around it.",
        "The four projections have a bias only with bias=True, as in the authors' code.",
        "The scaling form divides by the number of real keys, also where T != S; the paper has one n for queries and "
        "keys.",
    ),
    verified="third-party",
    defaults={
        "bias": "ours, the authors' code has one",
        "context_dim": "ours, as wide as dim",
        "normalisation": "code",
    },
)

Normalisation = Literal["softmax", "scaling"]


def efficient_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    *,
    keep: Bool[Tensor, "B S"] | None = None,
    normalisation: Normalisation = "softmax",
) -> Float[Tensor, "B H T V"]:
    """rho_q(q) (rho_k(k)^T v); memory for D x V numbers a head, whatever T and S. `keep` is True at real keys."""
    choice("efficient_attention", get_args(Normalisation), normalisation=normalisation)
    check_inputs(q, k, v)
    wide = torch.promote_types(v.dtype, torch.float32)
    queries, keys, values = (z.to(wide) for z in (q, k, v))
    hidden = None if keep is None else ~keep[:, None, :, None]
    if normalisation == "softmax":
        queries = queries.softmax(-1)
        maps = softmax(keys.mT, None if keep is None else keep[:, None, None])
    else:
        n = max(k.shape[2], 1) if keep is None else keep.sum(1).clamp(min=1)[:, None, None, None]
        # Divided by n once, here, rather than by sqrt(n) on both sides.
        maps = (keys if hidden is None else keys.masked_fill(hidden, 0)).mT / n
    context = maps @ values if hidden is None else maps @ values.masked_fill(hidden, 0)
    return (queries @ repeat_heads(context, q.shape[1])).to(v.dtype)


@CARD.module
class EfficientAttention(HeadMixer):
    """Bidirectional attention in time and memory linear in the number of tokens.

    Args:
        dim, num_heads, num_kv_heads, head_dim, bias, context_dim: as of `HeadMixer`.
        normalisation: "softmax" (the paper's main form) or "scaling".
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        context_dim: int | None = None,
        normalisation: Normalisation = "softmax",
    ) -> None:
        super().__init__(
            dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, bias=bias, context_dim=context_dim
        )
        choice(self, get_args(Normalisation), normalisation=normalisation)
        self.normalisation: Normalisation = normalisation

    def mix(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B G S D"],
        v: Float[Tensor, "B G S D"],
        keep: Bool[Tensor, "B S"] | None,
    ) -> Float[Tensor, "B H T D"]:
        return efficient_attention(q, k, v, keep=keep, normalisation=self.normalisation)
