"""StreamingLLM: the first few tokens, where attention drains to, and the newest ones."""

from typing import Unpack

import torch

from regard.cache.evict import LIMITS, TRIES, Asked, Evicting, Limits, Scores
from regard.cards import Card, Cost, Paper
from regard.checks import whole

CARD = Card(
    "streaming_llm",
    equation="kept: the first `sinks` tokens and the newest `budget` - sinks",
    papers=(
        Paper(
            "Efficient Streaming Language Models with Attention Sinks",
            "Xiao, Tian, Chen, Han, Lewis",
            2023,
            "2309.17453",
            "abstract; the authors' cache",
        ),
    ),
    protocol="CachePolicy",
    supports={"causal", "padding", "streaming"},
    cost=Cost("0", "budget*G*(2*D + 1)"),
    claim="The first tokens and the newest are kept, nothing between: "
    "tests/cache/test_policies.py::test_a_needle_survives_where_queries_ask_for_it.",
    differs=(
        "Keys keep the rotation of where they stood in the text, and queries that of where they stand; the authors "
        "count positions within the cache, which a rotary model then never leaves, and which moves keys nearer.",
    ),
    verified="third-party",
    example={"budget": 5, "sinks": 1},
    tries={"sinks": 2, **TRIES},
    defaults={"sinks": "code", **LIMITS},
)


def streaming_scores(asked: Asked, sinks: int) -> Scores:
    """1 for what is kept."""
    first = (asked.positions >= 0) & (asked.positions < sinks)
    recent = asked.target - sinks
    newest = asked.newest(recent.clamp(min=0) if isinstance(recent, torch.Tensor) else max(recent, 0))
    return (first | newest).to(torch.promote_types(asked.k.dtype, torch.float32))


@CARD.module
class StreamingLLM(Evicting):
    """Keeps the first and the newest tokens.

    Args:
        sinks: how many of the first.
        limits: `budget` and `every`, as of `regard.cache.Evicting`.
    """

    def __init__(self, *, sinks: int = 4, **limits: Unpack[Limits]) -> None:
        super().__init__(**limits)
        whole(self, 0, sinks=sinks)
        self.sinks = sinks

    def judge(self, asked: Asked) -> tuple[Scores, None]:
        return streaming_scores(asked, self.sinks), None
