"""Cog attention: softmax of the absolute scores, each weight carrying the sign of its score.

    A_ts = sign(P_ts) exp(|P_ts| - m_t) / sum_s' exp(|P_ts'| - m_t),   m_t = max_s |P_ts|,   allowed s only

A head can add what one token holds and subtract what another holds at once. Absolute weights sum to 1,
weights do not. Lv et al. 2024, https://arxiv.org/abs/2411.07176: the authors' released code was followed
(abstract and introduction read; the equations of the method section were not). Differs from the paper: only
the normaliser is here. The authors' models also use rotary positions (`cog+rotary`) and keep plain softmax in
the first and last layer, which is the host model's choice.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard._former import FEATURES, Card, Cost, Paper, register
from regard.normalizers.softmax import softmax
from regard.shapes import HeadShape
from regard.stages import Normalizer


def cog(scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None) -> Float[Tensor, "B H t S"]:
    """sign(scores) * softmax(|scores|). A score of exactly 0 gets weight 0."""
    z = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if allowed is not None:
        z = z.masked_fill(~allowed, 0)  # whatever a masked entry holds must not reach sign() or abs()
    return (z.sign() * softmax(z.abs(), allowed)).to(scores.dtype)


class Cog(Normalizer):
    """Signed weights whose absolute values sum to 1."""

    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None
    ) -> Float[Tensor, "B H t S"]:
        return cog(scores, allowed)


def _slots(shape: HeadShape) -> dict[str, object]:
    return {"normalizer": Cog()}


CARD = register(
    Card(
        name="cog",
        family="normalizers",
        gist="Softmax of |score| times sign(score): weights can be negative.",
        equation="A = sign(P) * softmax(|P|),  P = q k^T / sqrt(D)",
        paper=Paper(
            "More Expressive Attention with Negative Weights",
            "Lv, Xie, Li, Liao, Sun, Kang, Wang, Yan",
            2024,
            "2411.07176",
            "official code; equations of the method section not read",
        ),
        slots=_slots,
        supports=FEATURES,
        traits=frozenset({"linear_in_values", "position_free", "shift_invariant", "head_independent"}),
        cost=Cost("2*B*H*T*S*D", "2*S*G*D"),
        claim="One head can copy one token and delete another: tests/normalizers/test_cog.py.",
        differs=("Only the normaliser: rotary positions and the outer layers' softmax are the host's choice.",),
        verified="third-party",
    )
)
