"""Multi-head scaled dot-product attention with softmax: the baseline.

    head_h = softmax(q_h k_g^T / sqrt(D)) v_g,   g = h // (H / G),   y = concat_h(head_h) W_o
    G = H: multi-head        G = 1: multi-query        G between: grouped-query

The pipeline itself is this mechanism, so the cards fill no slot but the number of key/value heads.
"""

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import divides, refuse, whole

CARD = Card(
    "softmax",
    equation="y = softmax(q k^T / sqrt(D)) v",
    papers=(Paper("Attention Is All You Need", "Vaswani et al.", 2017, "1706.03762", "equation 1; section 3.2"),),
    traits=PLAIN,
    claim="Any key is one layer away from any query: "
    "tests/heads/test_multi_head.py::test_any_key_is_one_layer_away_from_any_query.",
    verified="third-party",
)

MQA = Card(
    "mqa",
    equation="head_h = softmax(q_h k^T / sqrt(D)) v",
    papers=(
        Paper(
            "Fast Transformer Decoding: One Write-Head is All You Need",
            "Shazeer",
            2019,
            "1911.02150",
            "not its own text, but the form in transformers' Llama",
        ),
    ),
    gist="Multi-query attention: all query heads share one key and value head; a cache H times smaller.",
    supports=CARD.supports - {"gqa"},
    traits=PLAIN,
    cost=Cost("2*B*H*T*S*D", "2*S*D"),
    claim="Little loss of quality for much faster decoding, at full size only. In small: the state is H times "
    "smaller: tests/heads/test_multi_head.py::test_the_cache_shrinks_by_the_heads_shared.",
    verified="third-party",
)

GQA = Card(
    "gqa",
    equation="head_h = softmax(q_h k_g^T / sqrt(D)) v_g,  g = h // (H / G)",
    papers=(
        Paper(
            "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
            "Ainslie et al.",
            2023,
            "2305.13245",
            "not its own text, but the form in transformers' Llama",
        ),
    ),
    gist="Grouped-query attention: query heads share keys and values in G groups.",
    traits=PLAIN,
    claim="Quality close to multi-head at a speed close to multi-query, at full size only. In small: the state is H / "
    "G times smaller: tests/heads/test_multi_head.py::test_the_cache_shrinks_by_the_heads_shared.",
    verified="third-party",
)


@CARD.fills()
def multi_head() -> dict[str, object]:
    """Every slot stays empty."""
    return {}


@MQA.fills("num_kv_heads")
def multi_query(num_heads: int, num_kv_heads: int) -> int:
    """1, whatever the number of query heads."""
    if num_kv_heads not in (1, num_heads):
        refuse("mqa", "num_kv_heads", "is not 1", num_kv_heads, "1; 'gqa' has other numbers")
    return 1


@GQA.fills("num_kv_heads")
def grouped_query(num_heads: int, num_kv_heads: int) -> int:
    """The number that was asked for; without one, the largest divisor of H up to H / 4.

    H itself counts as none asked for: groups of one head are plain multi-head attention.
    """
    whole("gqa", num_kv_heads=num_kv_heads)
    divides("gqa", num_kv_heads=num_kv_heads, num_heads=num_heads)
    if num_kv_heads < num_heads:
        return num_kv_heads
    return max(g for g in range(1, max(1, num_heads // 4) + 1) if num_heads % g == 0)
