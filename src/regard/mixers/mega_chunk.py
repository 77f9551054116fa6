"""Mega in chunks: attention stays inside chunks of C tokens, and the moving average alone joins them. Linear in T.

    A_ij = 0 unless i // C == j // C;   all else as in Mega (see `mega.py`)

Ma et al. 2022, https://arxiv.org/abs/2209.10655: abstract read; as the authors' released code has it.
Differs from the code: lengths need not be multiples of C (the last chunk is short).
"""

from typing import Any

from regard._former import Card, Cost, register
from regard.mixers.mega import DIFFERS, PAPER, Mega, build_mega
from regard.mixers.mega_attention import Weighting
from regard.shapes import HeadShape


def _build(
    shape: HeadShape,
    *,
    causal: bool,
    chunk: int = 128,
    qk_dim: int | None = None,
    value_dim: int | None = None,
    ema_dim: int = 16,
    weighting: Weighting = "softmax",
    dropout: float = 0.0,
) -> Mega:
    options: dict[str, Any] = {"chunk": chunk, "dropout": dropout}
    return build_mega(shape, causal, qk_dim, value_dim, ema_dim, weighting, **options)


CARD = register(
    Card(
        name="mega_chunk",
        family="mixers",
        gist="Mega with attention inside chunks: the moving average carries the rest, in linear time.",
        equation="A_ij = 0 unless i // C == j // C; the moving average of Mega runs through",
        paper=PAPER,
        build=_build,
        supports=Mega.supports,
        cost=Cost("B*T*chunk*(qk_dim + value_dim) + B*T*M*(64 + 2*ema_dim)", "M*ema_dim + chunk*(qk_dim + value_dim)"),
        claim="Linear in T, and Mega itself for one chunk: tests/mixers/test_mega.py.",
        differs=(*DIFFERS, "Lengths need not be multiples of the chunk: the last chunk is short."),
        verified="third-party",
        example={"chunk": 5, "qk_dim": 6, "value_dim": 10, "ema_dim": 3, "weighting": "laplace"},
    )
)
