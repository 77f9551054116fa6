"""Hedgehog: linear attention through softmaxes over trained features, which learn to mimic softmax."""

from functools import partial
from typing import Unpack

from regard.cards import PLAIN, Card, Cost, Paper
from regard.linear.features import Hedgehog
from regard.linear.linear import LinearAttention
from regard.pipeline.head_mixer import Projections

CARD = Card(
    "hedgehog",
    equation="""phi(x) = softmax([y ; -y]),   y = f (W x + b)          2D features;  W = 1, b = 0 at the start, f = 2
out_i = phi_q(q_i) sum_j phi_k(k_j)^T v_j / (phi_q(q_i) . sum_j phi_k(k_j)),   j <= i when causal""",
    papers=(
        Paper(
            "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
            "Zhang, Bhatia, Kumbong, Ré",
            2024,
            "2402.04347",
            "abstract; a public port of it (flash-linear-attention)",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "cross", "gqa", "streaming", "compile"},
    traits=PLAIN,
    cost=Cost("B*H*(T + S)*D*(3*D + 2)", "2*H*D*(D + 1)"),
    claim="Trained on softmax's weights its maps come close to them, and closer than untrained ones: "
    "tests/linear/test_hedgehog.py::test_learns_softmax_s_weights.",
    differs=(
        "One map for the queries of all heads and one for the keys, as in the port.",
        "The factor f = 2 is the port's; the paper is said to have none, and exp without the sum as its other form.",
    ),
    verified="third-party",
    exceptions={"L25": "sharp features fall below what float32 holds; gradients through a sum of such are not finite"},
    defaults={"bias": "ours", "context_dim": "ours, as wide as dim", "factor": "code, flash-linear-attention"},
)


@CARD.module
class HedgehogAttention(LinearAttention):
    """Multi-head linear attention with Hedgehog's maps.

    Args:
        dim, num_heads, rest: as of `HeadMixer`.
        factor: f > 0, what sharpens the softmax.
    """

    def __init__(self, dim: int, num_heads: int, *, factor: float = 2.0, **rest: Unpack[Projections]) -> None:
        super().__init__(dim, num_heads, feature=partial(Hedgehog, factor=factor), **rest)
