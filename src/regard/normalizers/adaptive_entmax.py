"""Adaptively sparse attention: alpha-entmax whose alpha every head learns for itself."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import checked, whole
from regard.normalizers.entmax import entmax_in
from regard.stages import Normalizer

CARD = Card(
    "adaptive_entmax",
    equation="""p = alpha_h-entmax(z),   alpha_h = clamp(1 + sigmoid(a_h), 1.01, 2),   a_h ~ N(0, 1) at the start
dalpha = sum_s dp_s ((p_s - h_s) / (alpha - 1)^2 - (p_s log p_s - h_s sum(p log p)) / (alpha - 1))
with h = g / sum(g), g_s = p_s^(2 - alpha) on the support""",
    papers=(
        Paper(
            "Adaptively Sparse Transformers",
            "Correia, Niculae, Martins",
            2019,
            "1909.00015",
            "introduction; official code; public copies of the translation code for the parameter per head",
        ),
    ),
    traits=PLAIN | {"sparse"},
    cost=Cost("2*B*H*T*S*D + 8*B*H*T*S", "2*S*G*D"),
    claim="Every head has a sparsity of its own: a larger alpha leaves fewer keys: "
    "tests/normalizers/test_entmax.py::test_a_larger_alpha_leaves_fewer_keys.",
    differs=("The start N(0, 1) of a and the clamp come from code copies.",),
    verified="third-party",
)


@CARD.fills("normalizer")
class AdaptiveEntmax(Normalizer):
    """One learned alpha in [1.01, 2] per head, from the raw parameter `pre_alpha` (H,)."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        whole(self, num_heads=num_heads)
        self.num_heads = num_heads
        self.pre_alpha = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.pre_alpha)

    def start_neutral(self) -> bool:
        """Close to softmax, alpha = 1.018, where alpha still learns."""
        nn.init.constant_(self.pre_alpha, -4.0)
        return True

    @property
    def alpha(self) -> Float[Tensor, " H"]:
        """The sparsity of each head, in at least fp32."""
        a = self.pre_alpha
        return (1 + a.to(torch.promote_types(a.dtype, torch.float32)).sigmoid()).clamp(1.01, 2.0)

    @checked(H="num_heads")
    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None
    ) -> Float[Tensor, "B H t S"]:
        return entmax_in(scores, self.alpha[:, None, None], allowed) if scores.shape[-1] else scores
