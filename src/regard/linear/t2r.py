"""T2R: linear attention through rectified linear maps, as a transformer is turned into an RNN."""

from functools import partial
from typing import Unpack

from regard.cards import PLAIN, Card, Cost, Paper
from regard.linear.features import T2R
from regard.linear.linear import LinearAttention
from regard.pipeline.head_mixer import Projections

CARD = Card(
    "t2r",
    equation="""phi(x) = relu(W x)          num_features rows
out_i = phi_q(q_i) sum_j phi_k(k_j)^T v_j / (phi_q(q_i) . sum_j phi_k(k_j)),   j <= i when causal""",
    papers=(
        Paper(
            "Finetuning Pretrained Transformers into RNNs",
            "Kasai et al.",
            2021,
            "2103.13076",
            "abstract; a public port of its map (flash-linear-attention)",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "cross", "gqa", "streaming", "compile"},
    traits=PLAIN - {"normalised"},
    cost=Cost("B*H*(T + S)*num_features*(2*D + 1)", "H*num_features*(D + 1)"),
    claim="Weights of as few features as one likes, with a state of that size: "
    "tests/linear/test_t2r.py::test_weights_have_the_rank_of_the_features.",
    differs=(
        "One map for the queries of all heads and one for the keys, without a bias, as in the port.",
        "A query whose features are 0 where all keys' are not gives 0.",
        "W is no part of q_proj and k_proj; a trained layer may have them multiplied.",
    ),
    verified="third-party",
    example={"num_features": 5},
    defaults={
        "bias": "ours",
        "context_dim": "ours, as wide as dim",
        "num_features": "code, flash-linear-attention: D",
    },
)


@CARD.module
class T2RAttention(LinearAttention):
    """Multi-head linear attention with T2R's maps.

    Args:
        dim, num_heads, rest: as of `HeadMixer`.
        num_features: of each head; default head_dim.
    """

    def __init__(
        self, dim: int, num_heads: int, *, num_features: int | None = None, **rest: Unpack[Projections]
    ) -> None:
        super().__init__(dim, num_heads, feature=partial(T2R, features=num_features), **rest)
        self.num_features = self.q_map.features
