"""AdaKV: the heads of a layer share its budget, each by how high its keys score among all."""

from typing import Literal, Unpack

from regard.cache.evict import LIMITS, TRIES, Limits, ragged
from regard.cache.snapkv import SnapKV
from regard.cards import Card, Cost, Paper
from regard.checks import number

CARD = Card(
    "adakv",
    equation="""scores as of snapkv;   kept: each head's floor * budget highest, and the highest of all
others in the layer, G budget together""",
    papers=(
        Paper(
            "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
            "Feng et al.",
            2024,
            "2407.11550",
            "recalled; the authors' code; kvpress",
        ),
    ),
    protocol="CachePolicy",
    supports={"causal", "padding", "streaming"},
    cost=Cost("B*H*window*S*D", "budget*G*(2*D + 1)"),
    verified="reconstructed",
    claim="A head that looks at many keys keeps more than one that looks at one, and memory is that of the sum: "
    "tests/cache/test_policies.py::test_heads_share_a_budget.",
    differs=("Key heads share the budget, each with its group's mean scores; the authors' have no grouped keys.",),
    example={"budget": 5, "window": 2, "kernel": 3},
    tries={"floor": 0.5, "window": 3, "kernel": 1, "pool": "max", **TRIES},
    defaults={"floor": "code", "window": "code", "kernel": "code", "pool": "code", **LIMITS},
)


@CARD.module
class AdaKV(SnapKV):
    """SnapKV with a budget for all heads of a layer together. Keys lie end to end, each head's own number.

    Args:
        floor: the part of the budget that each head has for itself.
        window, kernel, pool, limits: as of `regard.cache.SnapKV`.
    """

    def __init__(
        self,
        *,
        floor: float = 0.2,
        window: int = 64,
        kernel: int = 5,
        pool: Literal["mean", "max"] = "mean",
        **limits: Unpack[Limits],
    ) -> None:
        super().__init__(window=window, kernel=kernel, pool=pool, **limits)
        number(self, least=0, most=1, floor=floor)
        ragged(self, floor)
