"""KeyDiff: the keys that point away from where most keys point."""

import torch

from regard.cache.evict import LIMITS, TRIES, Asked, Evicting, Scores
from regard.cards import Card, Cost, Paper

CARD = Card(
    "keydiff",
    equation="score_j = -cos(k_j, a),   a = mean over all keys held of k_j / |k_j|",
    papers=(
        Paper(
            "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained "
            "Environments",
            "Park et al.",
            2025,
            "2504.15364",
            "recalled; the scores of kvpress",
        ),
    ),
    protocol="CachePolicy",
    supports={"causal", "padding", "streaming"},
    cost=Cost("B*G*S*D", "budget*G*(2*D + 1)"),
    claim="It needs no queries; of keys that say the same few are kept: "
    "tests/cache/test_policies.py::test_keys_that_differ_stay.",
    verified="third-party",
    example={"budget": 5},
    tries=TRIES,
    defaults=LIMITS,
)


def difference_scores(asked: Asked) -> Scores:
    """-cos of each key with the anchor."""
    k = torch.nn.functional.normalize(asked.k.to(torch.promote_types(asked.k.dtype, torch.float32)), dim=-1)
    real = (asked.positions >= 0)[..., None]
    anchor = k.masked_fill(~real, 0.0).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)
    return -torch.nn.functional.cosine_similarity(k, anchor, dim=-1)


@CARD.module
class KeyDiff(Evicting):
    """Keeps keys unlike the others. Options are `budget` and `every`, as of `regard.cache.Evicting`."""

    def judge(self, asked: Asked) -> tuple[Scores, None]:
        return difference_scores(asked), None
