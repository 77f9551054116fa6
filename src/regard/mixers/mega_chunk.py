"""Mega in chunks: attention stays inside chunks, and the moving average alone joins them."""

from typing import Unpack

from regard.cards import Card, Cost
from regard.mixers.mega import CARD as MEGA
from regard.mixers.mega import Mega, MegaOptions

CARD = Card(
    "mega_chunk",
    equation="A_ij = 0 unless i // C == j // C; all else as in Mega, whose moving average runs through",
    papers=MEGA.papers,
    supports=MEGA.supports,
    cost=Cost(
        "B*T*chunk*(qk_dim + value_dim) + B*T*M*(2*M + qk_dim + value_dim + 128 + 4*ema_dim)",
        "M*ema_dim + chunk*(qk_dim + value_dim)",
    ),
    claim="Linear in T, and Mega itself for one chunk: tests/mixers/test_mega.py::test_chunks_make_the_cost_linear, "
    "tests/mixers/test_mega.py::test_chunk_as_long_as_the_sequence_is_mega.",
    differs=(*MEGA.differs, "Lengths need not be multiples of the chunk: the last chunk is short."),
    verified="third-party",
    example={"chunk": 5, "qk_dim": 6, "value_dim": 10, "ema_dim": 3, "weighting": "laplace"},
    tries={"max_positions": 12},
    defaults={
        "chunk": "ours",
        "qk_dim": "code, the larger language model",
        "value_dim": "code, the larger language model",
        "ema_dim": "code",
        "norm": "code",
        "post_norm": "code",
        "weighting": "code",
        "max_positions": "ours, any length",
    },
)


@CARD.module
class MegaChunk(Mega):
    """`Mega` whose queries see the keys of their own chunk only: linear in T.

    Args:
        dim, rest: as of `Mega`.
        chunk: C; the default is this library's.
    """

    def __init__(self, dim: int, *, chunk: int = 128, **rest: Unpack[MegaOptions]) -> None:
        super().__init__(dim, chunk=chunk, **rest)
