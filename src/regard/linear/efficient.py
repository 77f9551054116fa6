"""Efficient attention: normalise queries over features and keys over positions, and the keys can meet the values first.

    out = rho_q(q) (rho_k(k)^T v)
    softmax:  rho_q = softmax over the D features of a token,  rho_k = softmax over the S positions of a feature
    scaling:  rho_q = q / sqrt(S),  rho_k = k / sqrt(S):  the same as (q k^T / S) v, in another order

Shen et al. 2021, "Efficient Attention: Attention with Linear Complexities", https://arxiv.org/abs/1812.01243
(WACV 2021): abstract read, the authors' released module followed; the scaling form is from the claim of equality.
Differs from the paper: several heads (as the authors' code), no residual inside the layer, and n is the number of real
keys where the paper has one n for queries and keys.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard._former import PLAIN, Card, Cost, Paper, register
from regard.kernels.check import check_inputs
from regard.linear._shared import repeat_heads
from regard.normalizers.softmax import softmax
from regard.pipeline.head_mixer import HeadMixer
from regard.shapes import HeadShape

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
    _check(normalisation)
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


def _check(normalisation: str) -> None:
    if normalisation not in ("softmax", "scaling"):
        raise ValueError(f"efficient: unknown normalisation {normalisation!r}; expected 'softmax' or 'scaling'")


class EfficientAttention(HeadMixer):
    """Bidirectional attention in time and memory linear in the number of tokens.

    Args:
        dim, num_heads, num_kv_heads, head_dim, bias, context_dim: as of `HeadMixer`.
        normalisation: "softmax" (the paper's main form) or "scaling".
    """

    supports = frozenset({"bidirectional", "padding", "cross", "gqa", "compile"})

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
        _check(normalisation)
        super().__init__(
            dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            bias=bias,
            context_dim=context_dim,
        )
        self.normalisation: Normalisation = normalisation

    def mix(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B G S D"],
        v: Float[Tensor, "B G S D"],
        keep: Bool[Tensor, "B S"] | None,
    ) -> Float[Tensor, "B H T D"]:
        return efficient_attention(q, k, v, keep=keep, normalisation=self.normalisation)


def _build(
    shape: HeadShape,
    *,
    causal: bool,
    normalisation: Normalisation = "softmax",
    bias: bool = False,
) -> EfficientAttention:
    if causal:
        raise ValueError("efficient: keys are normalised over all positions (got causal=True); build it causal=False")
    return EfficientAttention(
        shape.dim,
        shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        bias=bias,
        normalisation=normalisation,
    )


CARD = register(
    Card(
        name="efficient",
        family="linear",
        gist="Softmax over the features of queries and over the positions of keys; k^T v comes first.",
        equation="out = softmax_D(q) (softmax_S(k)^T v)",
        paper=Paper(
            "Efficient Attention: Attention with Linear Complexities",
            "Shen et al.",
            2021,
            "1812.01243",
            "abstract; the authors' code",
        ),
        build=_build,
        supports=EfficientAttention.supports,
        traits=PLAIN,
        cost=Cost("B*H*(T + S)*D*V", ""),
        claim="Linear in length, and with scaling equal to dot-product attention: tests/linear/test_efficient.py.",
        differs=(
            "Several heads, as in the authors' code; the paper has one.",
            "The residual of the authors' module belongs to the model around it.",
            "The scaling form divides by the number of real keys, also where T != S.",
        ),
        verified="third-party",
    )
)
