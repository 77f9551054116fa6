"""H2O: the keys that have received the most attention so far, and the newest."""

from typing import Literal, Unpack

import torch

from regard.cache.evict import LIMITS, TRIES, Asked, Evicting, Limits, Scores
from regard.cache.received import rows
from regard.cards import Card, Cost, Paper
from regard.checks import choice, number

CARD = Card(
    "h2o",
    equation="""score_j = sum over all queries i so far of the mean over the group's heads of A_ij
kept: the newest recent * budget, and the highest scores of the others""",
    papers=(
        Paper(
            "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
            "Zhang et al.",
            2023,
            "2306.14048",
            "abstract; the authors' code; kvpress's observed attention, for by='mean'",
        ),
    ),
    protocol="CachePolicy",
    supports={"causal", "padding", "streaming"},
    cost=Cost("B*H*T*S*D", "budget*G*(2*D + 2)"),
    claim="What many queries attended to is kept, and a sliding window loses it: "
    "tests/cache/test_policies.py::test_heavy_hitters_stay.",
    differs=(
        "Heads that share keys share a score, their mean; the authors have no grouped keys, and add up over the batch.",
        "A step first takes its query's weights into account and drops a key, then attends: never more than the budget "
        "is held.",
    ),
    verified="third-party",
    example={"budget": 5},
    tries={"by": "mean", "recent": 0.25, **TRIES},
    defaults={"by": "code", "recent": "paper", **LIMITS},
)


def accumulated(asked: Asked) -> Scores:
    """What was carried along, and the weights of this call's queries."""
    total = torch.zeros_like(asked.k[..., 0], dtype=torch.promote_types(asked.k.dtype, torch.float32))
    if asked.carried is not None:
        total = total + asked.carried
    for weights in rows(asked):
        total = total + weights.sum(3).mean(2)
    return total


@CARD.module
class H2O(Evicting):
    """Keeps heavy hitters and recent keys.

    Args:
        by: "sum" of the weights that a key received, or their "mean" over the queries that could see it.
        recent: this part of the budget is for the newest.
        limits: `budget` and `every`, as of `regard.cache.Evicting`.
    """

    needs_queries = judges_always = True

    def __init__(self, *, by: Literal["sum", "mean"] = "sum", recent: float = 0.5, **limits: Unpack[Limits]) -> None:
        super().__init__(**limits)
        choice(self, ("sum", "mean"), by=by)
        number(self, least=0, most=1, recent=recent)
        self.by, self.recent = by, recent

    def judge(self, asked: Asked) -> tuple[Scores, Scores]:
        total = accumulated(asked)
        scores = total
        if self.by == "mean":
            seen = asked.seen[:, None, None] if isinstance(asked.seen, torch.Tensor) else asked.seen
            scores = total / (seen - asked.positions).clamp(min=1)
        if self.recent:
            scores = scores.masked_fill(asked.newest(_part(asked.target, self.recent)), torch.inf)
        return scores, total


def _part(n: int | torch.Tensor, share: float) -> int | torch.Tensor:
    return (n * share).long() if isinstance(n, torch.Tensor) else int(n * share)
