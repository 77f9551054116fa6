"""DPFP: linear attention through sparse products of neighbours: more room, without parameters."""

from functools import partial
from typing import Unpack

from regard.cards import PLAIN, Card, Cost, Paper
from regard.linear.features import DPFP
from regard.linear.linear import LinearAttention
from regard.pipeline.head_mixer import Projections

CARD = Card(
    "dpfp",
    equation="""phi(x) = [z_i z_{i-j}]  for i = 1..2D, j = 1..nu,   z = [relu(x) ; relu(-x)],   indices in a circle
out_i = phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) . sum_j phi(k_j)),   j <= i when causal""",
    papers=(
        Paper(
            "Linear Transformers Are Secretly Fast Weight Programmers",
            "Schlag, Irie, Schmidhuber",
            2021,
            "2102.11174",
            "abstract; a public port of its map (flash-linear-attention)",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "cross", "gqa", "streaming", "compile"},
    traits=PLAIN - {"normalised"},
    cost=Cost("2*B*H*(T + S)*D*nu*(D + 1)", "2*H*D*nu*(D + 1)"),
    claim="More keys than D can be told apart, which elu + 1 of as wide heads can't, and most features are exactly 0: "
    "tests/linear/test_dpfp.py::test_has_room_for_more_keys_than_features_go_in.",
    differs=(
        "z ends in relu(-x), as in the paper; some versions of the port have -relu(x), which makes negative features.",
        "The paper's other part, the delta rule, is 'deltanet'; its sum of keys to 1 is left out.",
        "A query whose features are 0 where all keys' are not gives 0.",
    ),
    verified="third-party",
    example={"nu": 3},
    defaults={"bias": "ours", "context_dim": "ours, as wide as dim", "nu": "code, flash-linear-attention"},
)


@CARD.module
class DPFPAttention(LinearAttention):
    """Multi-head linear attention with DPFP's map.

    Args:
        dim, num_heads, rest: as of `HeadMixer`.
        nu: how far apart the multiplied neighbours are at most; up to 2D.
    """

    def __init__(self, dim: int, num_heads: int, *, nu: int = 4, **rest: Unpack[Projections]) -> None:
        super().__init__(dim, num_heads, feature=partial(DPFP, nu=nu), **rest)
