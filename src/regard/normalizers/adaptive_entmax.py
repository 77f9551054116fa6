"""Adaptively sparse attention: alpha-entmax whose alpha every head learns for itself.

    alpha_h = clamp(1 + sigmoid(a_h), 1.01, 2),   p = alpha_h-entmax(scores),   a_h ~ N(0, 1) at the start
    dalpha  = sum_s dp_s ((p_s - h_s) / (alpha - 1)^2 - (p_s log p_s - h_s sum(p log p)) / (alpha - 1))
    with h = g / sum(g), g_s = p_s^(2 - alpha) on the support

Correia, Niculae, Martins 2019, https://arxiv.org/abs/1909.00015 (introduction read; the authors' code
followed, and for the parameter per head public copies of their translation code).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard._former import FEATURES, PLAIN, Card, Cost, Paper, register
from regard.normalizers.entmax import entmax
from regard.shapes import HeadShape
from regard.stages import Normalizer


class AdaptiveEntmax(Normalizer):
    """One learned alpha in [1.01, 2] per head, from the raw parameter `pre_alpha` (H,)."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"AdaptiveEntmax: num_heads must be at least 1 (got {num_heads})")
        self.pre_alpha = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.pre_alpha)

    @property
    def alpha(self) -> Float[Tensor, "H"]:
        """The sparsity of each head, in at least fp32."""
        a = self.pre_alpha
        return (1 + a.to(torch.promote_types(a.dtype, torch.float32)).sigmoid()).clamp(1.01, 2.0)

    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None
    ) -> Float[Tensor, "B H t S"]:
        if scores.shape[1] != len(self.pre_alpha):
            raise ValueError(f"AdaptiveEntmax: scores have {scores.shape[1]} heads; expected {len(self.pre_alpha)}")
        return entmax(scores, self.alpha[:, None, None], allowed=allowed)


def _slots(shape: HeadShape) -> dict[str, object]:
    return {"normalizer": AdaptiveEntmax(shape.num_heads)}


CARD = register(
    Card(
        name="adaptive_entmax",
        family="normalizers",
        gist="alpha-entmax whose sparsity alpha is learned per head, from near softmax to sparsemax.",
        equation="p = alpha_h-entmax(z),  alpha_h = clamp(1 + sigmoid(a_h), 1.01, 2)",
        paper=Paper(
            "Adaptively Sparse Transformers",
            "Correia, Niculae, Martins",
            2019,
            "1909.00015",
            "official code; introduction read",
        ),
        slots=_slots,
        supports=FEATURES,
        traits=PLAIN | {"sparse"},
        cost=Cost("2*B*H*T*S*D + 8*B*H*T*S", "2*S*G*D"),
        claim="Heads settle on different sparsity: tests/normalizers/test_entmax.py.",
        differs=("The start N(0, 1) of a and the clamp come from code copies.",),
        verified="third-party",
    )
)
