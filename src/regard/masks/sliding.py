"""Sliding window attention: each query sees the keys of a window around it.

Stacking l layers widens the view about l times, so that cost grows linearly with length while the top layer sees far.
"""

from typing import Any

from regard.cards import PLAIN, Card, Cost, Paper
from regard.masks import patterns
from regard.masks.algebra import Mask
from regard.weights import Loaded

PAPERS = (
    Paper("Longformer: The Long-Document Transformer", "Beltagy, Peters, Cohan", 2020, "2004.05150", "section 3.1"),
)
SIDES = (
    "The paper's w counts w/2 keys on each side besides the query's own; here `window` counts those of one side with "
    "the query's own, which is what a causal layer sees: window = w/2 + 1."
)

WINDOW = Card(
    "window",
    equation="allowed(i, j) = |i - j| < window   (causal: 0 <= i - j < window)",
    papers=PAPERS,
    traits=PLAIN - {"position_free"},
    cost=Cost("2*B*H*T*min(S, 2*window - 1)*D", "2*min(S, window - 1)*G*D"),
    claim="Cost grows linearly with length; l layers of window W see about l * W tokens: "
    "tests/masks/test_sliding.py::test_cost_of_a_window_is_linear_in_length, "
    "tests/masks/test_sliding.py::test_stacked_windows_see_layers_times_as_far.",
    differs=(SIDES, "No separate global tokens and no second set of projections: add `| global_tokens(n)`."),
    verified="third-party",
    example={"window": 4},
    tasks=(
        "text(window=64)",
        "retrieval(window=16)",
        "copying(window=16)",
        "selective_copying(window=16)",
        "profile(window=512)",
    ),
    defaults={"window": "ours"},
)

DILATED = Card(
    "dilated_window",
    equation="allowed(i, j) = |i - j| < window * dilation and (i - j) % dilation == 0",
    papers=PAPERS,
    gist="Dilated window attention: each query sees every d-th key of a window d times as wide.",
    traits=PLAIN - {"position_free"},
    cost=Cost("2*B*H*T*min(S, 2*window - 1)*D", "2*min(S, (window - 1)*dilation)*G*D"),
    claim="With as many pairs as the plain window, l layers see about l * W * d tokens: "
    "tests/masks/test_sliding.py::test_a_dilated_window_allows_as_many_pairs_as_a_plain_one, "
    "tests/masks/test_sliding.py::test_stacked_windows_see_layers_times_as_far.",
    differs=(SIDES, "One dilation for all heads, where the paper gives each head its own: join masks with `per_head`."),
    verified="reconstructed",
    example={"window": 3, "dilation": 2},
    defaults={"window": "ours", "dilation": "ours"},
)


@WINDOW.fills("mask")
def sliding_window(*, window: int = 128) -> Mask:
    """Query i sees key j where |i - j| < window.

    Args:
        window: how many keys of one side, the query's own included. The default is this library's, not the paper's.
    """
    return patterns.window(window)


@DILATED.fills("mask")
def dilated_window(*, window: int = 128, dilation: int = 2) -> Mask:
    """Query i sees key j where |i - j| < window * dilation and dilation divides i - j.

    Args:
        window: how many keys of one side, the query's own included.
        dilation: d. Both defaults are this library's, not the paper's.
    """
    return patterns.dilated(window, dilation)


@WINDOW.loads(
    "transformers",
    *("MistralAttention", "MixtralAttention", "MinistralAttention", "Phi3Attention", "Starcoder2Attention"),
    *("Qwen2Attention", "Qwen2MoeAttention", "Qwen3Attention", "Qwen3MoeAttention", "Dots1Attention"),
    *("Gemma2Attention", "Gemma3Attention", "Gemma3nTextAttention", "Gemma4TextAttention", "VaultGemmaAttention"),
    *("GptOssAttention", "Olmo3Attention", "Cohere2Attention", "SmolLM3Attention", "CwmAttention"),
    *("Exaone4Attention", "ExaoneMoeAttention", "Qwen2VLAttention", "Qwen2_5_VLAttention", "AfmoeAttention"),
)
def _transformers(theirs: Any) -> Loaded | None:
    """The layer's own, or that of all layers, where the config does not say which have one."""
    size = theirs.sliding_window if hasattr(theirs, "sliding_window") else theirs.config.sliding_window
    size = size if getattr(theirs, "is_sliding", True) else None
    return Loaded(lambda: sliding_window(window=size)) if size else None
