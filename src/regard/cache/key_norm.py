"""Key norm: the keys with the smallest norms, which tend to receive the most attention."""

from regard.cache.evict import LIMITS, TRIES, Asked, Evicting, Scores
from regard.cards import Card, Cost, Paper

CARD = Card(
    "key_norm",
    equation="score_j = -|k_j|",
    papers=(
        Paper(
            "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
            "Devoto, Zhao, Scardapane, Minervini",
            2024,
            "2406.11430",
            "recalled; the scores of kvpress",
        ),
    ),
    protocol="CachePolicy",
    supports={"causal", "padding", "streaming"},
    cost=Cost("B*G*S*D", "budget*G*(2*D + 1)"),
    claim="It needs no queries, and keeps what is small: tests/cache/test_policies.py::test_small_keys_stay.",
    differs=("All layers are treated alike; the paper spares the first two.",),
    verified="third-party",
    example={"budget": 5},
    tries=TRIES,
    defaults=LIMITS,
)


def norm_scores(asked: Asked) -> Scores:
    """-|k|."""
    return -asked.k.norm(dim=-1)


@CARD.module
class KeyNorm(Evicting):
    """Keeps keys of small norm. Options are `budget` and `every`, as of `regard.cache.Evicting`."""

    def judge(self, asked: Asked) -> tuple[Scores, None]:
        return norm_scores(asked), None
