"""ReBased: linear attention whose weights are squares of products, which a learned offset moves."""

from typing import Unpack

from regard.cards import PLAIN, Card, Cost, Paper
from regard.linear.linear import LinearAttention
from regard.pipeline.head_mixer import Projections

CARD = Card(
    "rebased",
    equation="""w_ij = (u_i . u_j)^2 / D = phi(u_i) . phi(u_j),   phi(u) = [u_a^2, sqrt(2) u_a u_b]_{a < b} / sqrt(D)
u = gamma LN(x) + beta,   of queries and of keys their own
out_i = sum_j w_ij v_j / sum_j w_ij,   j <= i when causal""",
    papers=(
        Paper(
            "Linear Transformers with Learnable Kernel Functions are Better In-Context Models",
            "Aksenov et al.",
            2024,
            "2402.10644",
            "abstract; a public port of its map (flash-linear-attention)",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "cross", "gqa", "streaming", "compile"},
    traits=PLAIN,
    cost=Cost("B*H*(T + S)*D*(D + 1)*(D + 1)/2", "H*D*(D + 1)*(D + 1)/2"),
    claim="A pair's weight is the square of its product, and may be 0, as no exponential's: "
    "tests/linear/test_rebased.py::test_weights_are_squares_and_may_be_zero.",
    differs=(
        "The convolutions and windows of the paper's models are layers of their own.",
        "One norm for the queries of all heads and one for the keys, as in the port.",
    ),
    verified="third-party",
    exceptions={"L6 prefixes": "a first token's only square may be near 0, and gradients through its quotient round"},
    defaults={"bias": "ours", "context_dim": "ours, as wide as dim"},
)


@CARD.module
class RebasedAttention(LinearAttention):
    """Multi-head linear attention with ReBased's maps; arguments as of `HeadMixer`."""

    def __init__(self, dim: int, num_heads: int, **rest: Unpack[Projections]) -> None:
        super().__init__(dim, num_heads, feature="rebased", **rest)
