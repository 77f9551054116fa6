"""The formulas of cards against counted multiply-adds: mechanisms of every protocol, at two sizes.

Parts of the pipeline are in tests/kernels/test_flops.py, but for those that route.
"""

import pytest

import regard
from regard.laws.costs import compare

SIZES = ((256, 64, 8), (576, 128, 4))
"""Tokens (or pixels of a square, or nodes), head width, heads: so large that products are most of the work."""
ELEMENTWISE = {
    "domain_kl": "it works on means and variances, channel by channel",
    "entropy_regularizer": "it works on maps of weights, entry by entry",
    "exphormer": "edges multiply vector by vector",
    "fenchel_young": "it works on scores, entry by entry",
    "pointer": "its score adds query and key within a tanh",
    "sentinel": "likewise",
    "yoso": "its tables are sums",
}
"""Cards whose work no counter sees, or not the most of it."""
OPTIONS = {
    "anchor_stripes": {"block": 16, "step": 2},
    "fftnet": {"max_length": 1024},
    "infini": {"segment": 64},
    "flex_prefill": {"block": 64},
    "extractor": {"max_length": 1024},
    "flat_cross_feed_forward": {"max_length": 1024, "hidden": 40},
    "flat_feed_forward": {"max_length": 1024, "hidden": 40},
    "linformer": {"max_length": 1024},
    "masked_mixer": {"max_length": 1024},
    "deformable_v2": {"points": 4},
    "dynamic_local": {"group_channels": 8},
    "permuted_window": {"window": 8, "shift": 4},
    "tcsr": {"relative": False},
    "unidirectional_block": {"block": 8},
    "long_range_grouping": {"size": (8, 8), "stride": 4},
}
"""Where the defaults are too short or too long, or the example has no one number to put into the formula."""
NAMES = [
    n
    for n, card in regard.catalog.cards().items()
    if n in regard.mechanisms()
    and card.protocol not in regard.catalog.NO_LAYERS
    and (not card.is_part or "routed" in card.traits)
]


@pytest.mark.parametrize(("length", "width", "heads"), SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_the_formula_says_what_is_counted(name: str, length: int, width: int, heads: int) -> None:
    found = compare(regard.card(name), length=length, width=width, heads=heads, **OPTIONS.get(name, {}))
    if name in ELEMENTWISE:
        assert found.said >= found.counted
    else:
        assert found.said == pytest.approx(found.counted, rel=0.1)
