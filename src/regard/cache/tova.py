"""TOVA: the keys that the newest query attends to most, the same ones for all heads of a layer."""

from regard.cache.evict import LIMITS, TRIES, Asked, Evicting, Scores
from regard.cache.received import rows
from regard.cards import Card, Cost, Paper

CARD = Card(
    "tova",
    equation="score_j = mean over all heads h of A_hTj of the last query T;   kept: the `budget` highest",
    papers=(
        Paper(
            "Transformers are Multi-State RNNs",
            "Oren, Hassid, Yarden, Adi, Schwartz",
            2024,
            "2401.06104",
            "abstract; the authors' cache",
        ),
    ),
    protocol="CachePolicy",
    supports={"causal", "padding", "streaming"},
    cost=Cost("B*H*S*D", "budget*G*(2*D + 1)"),
    claim="What the last query asks for survives: "
    "tests/cache/test_policies.py::test_a_needle_survives_where_queries_ask_for_it.",
    differs=(
        "The newest key is always kept, as in kvpress; in the authors' cache it may go like any other.",
        "A step first drops a key by its query's weights, then attends: never more than the budget is held.",
    ),
    verified="third-party",
    example={"budget": 5},
    tries=TRIES,
    defaults=LIMITS,
)


def tova_scores(asked: Asked) -> Scores:
    """Weights of the last query, the same for all heads; the newest key's is 1 more than any."""
    (weights,) = rows(asked, last=1)
    scores = weights[:, :, :, 0].mean((1, 2))[:, None].expand_as(asked.positions).clone()
    scores[..., -1] = scores.amax() + 1
    return scores


@CARD.module
class TOVA(Evicting):
    """Keeps what the newest query attends to. Options are `budget` and `every`, as of `regard.cache.Evicting`."""

    needs_queries = True

    def judge(self, asked: Asked) -> tuple[Scores, None]:
        return tova_scores(asked), None
