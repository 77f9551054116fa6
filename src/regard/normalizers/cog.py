"""Cog attention: softmax of the absolute scores, each weight carrying the sign of its score.

A head can add what one token holds and subtract what another holds at once. Absolute weights sum to 1, weights do not.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Paper
from regard.checks import checked
from regard.normalizers.softmax import softmax
from regard.stages import Normalizer

CARD = Card(
    "cog",
    equation="""A_ts = sign(P_ts) exp(|P_ts| - m_t) / sum_s' exp(|P_ts'| - m_t),   m_t = max_s |P_ts|,   allowed s only
P = q k^T / sqrt(D)""",
    papers=(
        Paper(
            "More Expressive Attention with Negative Weights",
            "Lv, Xie, Li, Liao, Sun, Kang, Wang, Yan",
            2024,
            "2411.07176",
            "official code; abstract and introduction; the equations of the method section not read",
        ),
    ),
    traits={"linear_in_values", "position_free", "shift_invariant", "head_independent"},
    claim="One head can copy one token and delete another: "
    "tests/normalizers/test_cog.py::test_copies_one_token_and_deletes_another_at_once.",
    differs=(
        "Only the normaliser is here: the authors' models also use rotary positions (`cog+rotary`) and keep plain "
        "softmax in the first and last layer, which is the host model's choice.",
    ),
    verified="third-party",
)


def cog(scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None) -> Float[Tensor, "B H t S"]:
    """sign(scores) * softmax(|scores|). A score of exactly 0 gets weight 0."""
    z = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if allowed is not None:
        z = z.masked_fill(~allowed, 0)  # whatever a masked entry holds must not reach sign() or abs()
    return (z.sign() * softmax(z.abs(), allowed)).to(scores.dtype)


@CARD.fills("normalizer")
class Cog(Normalizer):
    """Signed weights whose absolute values sum to 1."""

    @checked()
    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None
    ) -> Float[Tensor, "B H t S"]:
        return cog(scores, allowed)
