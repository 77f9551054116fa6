"""Sliding window attention, plain and dilated: a query sees the keys near it, or every d-th of them.

    window:          |i - j| < W
    dilated window:  |i - j| < W d   and   i - j a multiple of d

Beltagy, Peters, Cohan 2020, https://arxiv.org/abs/2004.05150, section 3.1. Stacking l layers widens the
view about l times, so that cost grows linearly with length while the top layer sees far.
Differs from the paper: its window w is two-sided, w/2 keys on each side besides its own: w = 2 (W - 1). Here
W counts the keys of one side with the query's own, which is what a causal layer sees.
"""

from typing import Any

from regard.card import PLAIN, Card, Cost, Paper, register
from regard.kinds import HeadShape
from regard.masks.patterns import dilated, window

PAPER = Paper("Longformer: The Long-Document Transformer", "Beltagy, Peters, Cohan", 2020, "2004.05150", "section 3.1")
SIDES = "the paper's w counts w/2 keys on each side besides the query's own; here window = w/2 + 1"
TRAITS = PLAIN - {"position_free"}


def _window(shape: HeadShape, *, window: int = 128) -> dict[str, Any]:
    return {"mask": _sliding(window)}


def _dilated(shape: HeadShape, *, window: int = 128, dilation: int = 2) -> dict[str, Any]:
    return {"mask": dilated(window, dilation)}


_sliding = window  # the option of the same name hides it above

WINDOW = register(
    Card(
        name="window",
        family="masks",
        gist="Each query sees the keys of a window around it.",
        equation="allowed(i, j) = |i - j| < window   (causal: 0 <= i - j < window)",
        paper=PAPER,
        slots=_window,
        traits=TRAITS,
        cost=Cost("2*B*H*T*min(S, 2*window - 1)*D", "2*min(S, window - 1)*G*D"),
        claim="Cost grows linearly with length; l layers of window W see about l * W tokens.",
        differs=(
            SIDES,
            "no separate global tokens and no second set of projections: add `| global_tokens(n)`",
        ),
        verified="third-party",
        example={"window": 4},
    )
)

DILATED = register(
    Card(
        name="dilated_window",
        family="masks",
        gist="Each query sees every d-th key of a window that is d times as wide.",
        equation="allowed(i, j) = |i - j| < window * dilation and (i - j) % dilation == 0",
        paper=PAPER,
        slots=_dilated,
        traits=TRAITS,
        cost=Cost("2*B*H*T*min(S, 2*window - 1)*D", "2*min(S, (window - 1)*dilation)*G*D"),
        claim="At the cost of the plain window, l layers see about l * W * d tokens.",
        differs=(
            SIDES,
            "one dilation for all heads, where the paper gives each head its own: join masks with `per_head`",
        ),
        verified="reconstructed",
        example={"window": 3, "dilation": 2},
    )
)
