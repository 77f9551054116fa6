"""Multi-head scaled dot-product attention, and its forms that share keys and values between query heads.

    head_h = softmax(q_h k_g^T / sqrt(D)) v_g,   g = h // (H / G),   y = concat_h(head_h) W_o
    G = H: multi-head (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2)
    G = 1: multi-query (Shazeer 2019, https://arxiv.org/abs/1911.02150)
    G between: grouped-query (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245)

The pipeline itself is this mechanism, so the cards fill no slot but the number of key/value heads.
"""

from regard.card import FEATURES, PLAIN, Card, Cost, Paper, register
from regard.kinds import HeadShape


def _multi_head(shape: HeadShape) -> dict[str, object]:
    return {}


def _multi_query(shape: HeadShape) -> dict[str, object]:
    if shape.num_kv_heads not in (1, shape.num_heads):
        raise ValueError(f"mqa: num_kv_heads is always 1 (got {shape.num_kv_heads}); use 'gqa' for other numbers")
    return {"num_kv_heads": 1}


def _grouped_query(shape: HeadShape, *, num_kv_heads: int | None = None) -> dict[str, object]:
    """An explicit number wins, then the shape's if it is a grouping, else the largest divisor of H up to H /
    4.
    """
    heads = shape.num_heads
    if num_kv_heads is None and shape.num_kv_heads < heads:
        num_kv_heads = shape.num_kv_heads
    if num_kv_heads is None:
        num_kv_heads = max(g for g in range(1, max(1, heads // 4) + 1) if heads % g == 0)
    if num_kv_heads < 1 or heads % num_kv_heads:
        raise ValueError(f"gqa: num_kv_heads must divide num_heads {heads} (got {num_kv_heads})")
    return {"num_kv_heads": num_kv_heads}


CARD = register(
    Card(
        name="softmax",
        family="heads",
        gist="Multi-head scaled dot-product attention with softmax: the baseline.",
        equation="y = softmax(q k^T / sqrt(D)) v",
        paper=Paper("Attention Is All You Need", "Vaswani et al.", 2017, "1706.03762", "equation 1; section 3.2"),
        slots=_multi_head,
        supports=FEATURES,
        traits=PLAIN,
        cost=Cost("2*B*H*T*S*D", "2*S*G*D"),
        claim="Any key is one step away from any query.",
        verified="third-party",
    )
)

MQA = register(
    Card(
        name="mqa",
        family="heads",
        gist="All query heads share one key head and one value head: a cache H times smaller.",
        equation="head_h = softmax(q_h k^T / sqrt(D)) v",
        paper=Paper("Fast Transformer Decoding: One Write-Head is All You Need", "Shazeer", 2019, "1911.02150"),
        slots=_multi_query,
        supports=FEATURES - {"gqa"},
        traits=PLAIN,
        cost=Cost("2*B*H*T*S*D", "2*S*D"),
        claim="Little loss of quality for much faster decoding; the state formula shows the factor H.",
        verified="third-party",
    )
)

GQA = register(
    Card(
        name="gqa",
        family="heads",
        gist="Query heads share keys and values in G groups: between multi-head and multi-query.",
        equation="head_h = softmax(q_h k_g^T / sqrt(D)) v_g,  g = h // (H / G)",
        paper=Paper(
            "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
            "Ainslie et al.",
            2023,
            "2305.13245",
        ),
        slots=_grouped_query,
        supports=FEATURES,
        traits=PLAIN,
        cost=Cost("2*B*H*T*S*D", "2*S*G*D"),
        claim="Quality close to multi-head at a speed close to multi-query; state is H / G times smaller.",
        verified="third-party",
    )
)
