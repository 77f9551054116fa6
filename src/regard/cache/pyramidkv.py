"""PyramidKV: SnapKV whose budget falls from the first layer to the last."""

from typing import Literal, Self, Unpack

from regard.cache.evict import LIMITS, TRIES, Limits
from regard.cache.snapkv import SnapKV
from regard.cards import Card, Cost, Paper
from regard.checks import number

CARD = Card(
    "pyramidkv",
    equation="""layer l of L: budget_l = most - l (most - least) / (L - 1)
least = budget / beta,   most = 2 budget - least
scores as of snapkv""",
    papers=(
        Paper(
            "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
            "Cai et al.",
            2024,
            "2406.02069",
            "recalled; kvpress, and the pyramid of AdaKV's authors",
        ),
    ),
    protocol="CachePolicy",
    supports={"causal", "padding", "streaming"},
    cost=Cost("B*H*window*S*D", "budget*G*(2*D + 1)"),
    claim="Budgets fall over the layers, and their mean is the budget: "
    "tests/cache/test_policies.py::test_a_pyramid_of_budgets.",
    differs=(
        "The pyramid is over all keys kept, the newest `window` among them, as in kvpress; others set those apart.",
        "Budgets are cut to whole keys, so that all layers together keep no more than told; a share is at most all.",
    ),
    example={"budget": 5, "window": 2, "kernel": 3},
    tries={"beta": 2.0, "window": 3, "kernel": 1, "pool": "max", **TRIES},
    defaults={"beta": "code", "window": "code", "kernel": "code", "pool": "code", **LIMITS},
)


def pyramid(budget: float, n: int, layers: int, beta: float) -> float:
    """The budget of layer n."""
    least = budget / beta
    most = 2 * budget - least
    return budget if layers == 1 else most - n * (most - least) / (layers - 1)


@CARD.module
class PyramidKV(SnapKV):
    """SnapKV with more for lower layers.

    Args:
        beta: how steep: the last layer keeps 1 / beta of the budget. 1 is SnapKV.
        window, kernel, pool, limits: as of `regard.cache.SnapKV`.
    """

    def __init__(
        self,
        *,
        beta: float = 20.0,
        window: int = 64,
        kernel: int = 5,
        pool: Literal["mean", "max"] = "mean",
        **limits: Unpack[Limits],
    ) -> None:
        super().__init__(window=window, kernel=kernel, pool=pool, **limits)
        number(self, least=1, beta=beta)
        self.beta = beta

    def at_layer(self, n: int, layers: int) -> Self:
        """The policy with this layer's budget."""
        own = pyramid(self.budget, n, layers, self.beta)
        return self.with_budget(max(1, int(own)) if isinstance(self.budget, int) else min(own, 1.0))
