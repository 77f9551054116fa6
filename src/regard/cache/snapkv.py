"""SnapKV: the keys that a prompt's last queries attend to, with their neighbours, and the newest."""

from typing import Literal, Unpack

import torch

from regard.cache.evict import LIMITS, TRIES, Asked, Evicting, Limits, Scores
from regard.cache.received import rows
from regard.cards import Card, Cost, Paper
from regard.checks import choice, refuse, whole

CARD = Card(
    "snapkv",
    equation="""score_j = pool over j' near j of mean over the last w queries i and the group's heads of A_ij'
kept: the newest w keys, and the highest scores of the others""",
    papers=(
        Paper(
            "SnapKV: LLM Knows What You are Looking for Before Generation",
            "Li et al.",
            2024,
            "2404.14469",
            "abstract; the authors' code; kvpress",
        ),
    ),
    protocol="CachePolicy",
    supports={"causal", "padding", "streaming"},
    cost=Cost("B*H*window*S*D", "budget*G*(2*D + 1)"),
    claim="What the end of a prompt asks for survives: "
    "tests/cache/test_policies.py::test_a_needle_survives_where_queries_ask_for_it.",
    differs=(
        "Heads that share keys share a score, their mean, as in kvpress.",
        "The budget holds while tokens are generated too: a step's observation window is its own query, so that no "
        "queries are stored. The authors compress the prompt alone.",
    ),
    verified="third-party",
    example={"budget": 5, "window": 2, "kernel": 3},
    tries={"window": 3, "kernel": 1, "pool": "max", **TRIES},
    defaults={"window": "code", "kernel": "code", "pool": "code", **LIMITS},
)


def snap_scores(asked: Asked, *, window: int, kernel: int, pool: Literal["mean", "max"] = "mean") -> Scores:
    """Mean weights of the last queries, pooled along the keys before the newest `window`; these score 1 more than
    any."""
    n = asked.k.shape[2]
    w = min(window, n)
    total = torch.zeros_like(asked.k[..., 0], dtype=torch.promote_types(asked.k.dtype, torch.float32))
    for weights in rows(asked, last=w):
        total = total + weights.sum(3).mean(2)
    assert asked.q is not None
    mean = total[..., : n - w] / max(1, min(w, asked.q.shape[2]))
    if n > w:
        pooling = torch.nn.functional.avg_pool1d if pool == "mean" else torch.nn.functional.max_pool1d
        mean = pooling(mean, kernel, stride=1, padding=kernel // 2)
    top = mean.amax() + 1 if mean.numel() else mean.new_ones(())
    return torch.cat([mean, top.expand(*mean.shape[:2], w)], -1)


@CARD.module
class SnapKV(Evicting):
    """Keeps what the last queries look at.

    Args:
        window: w. With a budget of no more than that it keeps the newest alone.
        kernel: how many keys are pooled, an odd number.
        pool: "mean" or "max".
        limits: `budget` and `every`, as of `regard.cache.Evicting`.
    """

    needs_queries = True

    def __init__(
        self,
        *,
        window: int = 64,
        kernel: int = 5,
        pool: Literal["mean", "max"] = "mean",
        **limits: Unpack[Limits],
    ) -> None:
        super().__init__(**limits)
        whole(self, window=window, kernel=kernel)
        choice(self, ("mean", "max"), pool=pool)
        if kernel % 2 == 0:
            refuse(self, "kernel", "is even", kernel, "an odd number, so that it has a middle")
        self.window, self.kernel, self.pool = window, kernel, pool

    def judge(self, asked: Asked) -> tuple[Scores, Scores | None]:
        return snap_scores(asked, window=self.window, kernel=self.kernel, pool=self.pool), None
