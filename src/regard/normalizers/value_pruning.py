"""SpAtten's local value pruning: each query drops its smallest weights and leaves the rest as it is."""

import math

from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import checked, number
from regard.normalizers.softmax import softmax
from regard.stages import Normalizer

PAPERS = (
    Paper(
        "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning",
        "Wang, Zhang, Han",
        2021,
        "2012.09852",
        "abstract; the authors' published code, which lacks the cascade; formulas as quoted by others; the pruner of "
        "the code of Learned Token Pruning",
    ),
)

CARD = Card(
    "value_pruning",
    equation="""P = softmax(scores);   A_ij = 0 for the floor(ratio n_i) smallest of the n_i allowed P_ij, else P_ij
what is left is not normalised again, so that a row sums to less than 1""",
    papers=PAPERS,
    traits={"nonnegative", "linear_in_values", "position_free", "shift_invariant", "head_independent", "sparse"},
    cost=Cost("2*B*H*T*S*D + 4*B*H*T*S", "2*S*G*D"),
    claim="A third of the values is never fetched: "
    "tests/normalizers/test_value_pruning.py::test_a_share_of_the_values_counts_for_nothing.",
    differs=("Of equal weights those of later keys go first.",),
    verified="reconstructed",
    example={"ratio": 0.3},
    defaults={"ratio": "ours, none is told"},
)

SLACK = 1e-9
"""So that 0.3 of 10 are 3 whichever way 0.3 is rounded."""


@checked()
def local_value_topk(
    weights: Float[Tensor, "... S"], ratio: float, allowed: Bool[Tensor, "..."] | None = None
) -> Float[Tensor, "... S"]:
    """The weights, 0 at the floor(ratio n) smallest of each row's n allowed ones; nothing is normalised again."""
    number("local_value_topk", least=0, below=1, ratio=ratio)
    S = weights.shape[-1]
    order = weights.detach()
    counts: Tensor | int
    if allowed is None:
        counts = S - math.floor(S * ratio + SLACK)
    else:
        order = order.masked_fill(~allowed, -1.0)
        n = allowed.sum(-1, keepdim=True)
        counts = n - (n.double() * ratio + SLACK).floor().long()
    rank = order.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return weights.masked_fill(rank >= counts, 0)


@CARD.fills("normalizer")
class ValuePruning(Normalizer):
    """Softmax without the smallest weights of each row.

    Args:
        ratio: the share of a row's allowed keys that is dropped, in [0, 1).
    """

    def __init__(self, *, ratio: float = 0.25) -> None:
        super().__init__()
        number(self, least=0, below=1, ratio=ratio)
        self.ratio = ratio

    @checked()
    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None
    ) -> Float[Tensor, "B H t S"]:
        return local_value_topk(softmax(scores, allowed), self.ratio, allowed)

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}"
