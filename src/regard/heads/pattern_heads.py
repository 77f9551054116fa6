"""Human-guided patterns: some heads see only what a stated pattern allows, and need not learn it.

What the patterns are is found first: `regard.inspect.analyses.pattern_relevance` tells how much of its attention each
head of a trained model spends on a pattern.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import refuse, whole
from regard.masks import Mask, full, offset, per_head
from regard.stages import Mix, Rows

CARD = Card(
    "pattern_heads",
    equation="""mask:   A_h = softmax(q k^T / sqrt(D) where P_h(i, j), else -inf)
fixed:  A_h = P_h(i, j) / sum_j P_h(i, j),   no gradient to the head's q and k
P_2: j = i + 1,   P_3: j = i - 1, both fixed;   given with the call: P_0 the same token, P_1 the same sentence""",
    papers=(
        Paper(
            "Human Guided Exploitation of Interpretable Attention Patterns in Summarization and Topic Segmentation",
            "Li, Xiao, Xing, Wang, Murray, Carenini",
            2022,
            "2112.05364",
            "abstract; official code of summarization; that of segmentation by an account and its numbers",
        ),
    ),
    traits={"nonnegative", "linear_in_values", "head_independent"},
    cost=Cost("2*B*max(1, H - 2)*T*S*D", "2*S*G*D"),
    claim="A fixed head copies the value of the next token exactly, and what needs the same token elsewhere is learned "
    "at once where a head sees those alone: tests/heads/test_pattern_heads.py::test_the_next_value_is_copied, "
    "tests/heads/test_pattern_heads.py::test_a_matching_head_finds_what_occurs_again.",
    differs=(
        "The cost is that of two fixed heads, which read one key each; other heads see all.",
        "A query that a pattern leaves without a key gives 0; the code adds -10000 to all keys, and such a query sees "
        "all of them, padding too.",
        "Patterns of token ids come with each call, `mask=pattern_mask({0: masks.same_token(ids), ...}, num_heads)`: a "
        "layer has no ids.",
        "Which tokens match differs between the code's two tasks: masks.same_token(ids) is that of summarization, "
        "itself=True that of segmentation, where a comment says otherwise than the code does.",
        'The option "synthesize" of the code, which fixes the matching heads of the first group alone, is `fixed`, '
        "for any head; special tokens are not left out.",
        "Projected attention layers, by which patterns go into a large model, are not built.",
        "In a causal layer the head that looks at the next token sees nothing.",
    ),
    verified="third-party",
    example={"patterns": (-1,)},
    tries={"patterns": (-2, None, None, None, 1), "fixed": (0, 1, 2, 3)},
    defaults={
        "patterns": "code, heads_per_pattern = 1, in the order of summarization",
        "fixed": "code, those of a fixed offset",
    },
)


Patterns = Mapping[int, Mask | int] | Sequence[Mask | int | None]
"""Head -> what it may see, a mask or n for the token n later; or such one after another, None for a head without."""


def _by_head(patterns: Patterns, num_heads: int) -> dict[int, Mask | int]:
    """The patterns by head, refused where they are none or their head is not there."""
    whole("pattern_mask", num_heads=num_heads)
    if isinstance(patterns, str) or not isinstance(patterns, Mapping | Sequence):
        wanted = "{head: mask or int}, or a sequence of such"
        refuse("pattern_mask", "patterns", "has the wrong type", type(patterns).__name__, wanted, error=TypeError)
    if not isinstance(patterns, Mapping):
        patterns = {head: pattern for head, pattern in enumerate(patterns) if pattern is not None}
    for head, pattern in patterns.items():
        whole("pattern_mask", 0, most=num_heads - 1, head=head)
        if not isinstance(pattern, Mask | int) or isinstance(pattern, bool):
            wanted = "a mask, or n for the token n later"
            refuse("pattern_mask", f"patterns[{head}]", "is none", type(pattern).__name__, wanted, error=TypeError)
    return dict(patterns)


def pattern_mask(patterns: Patterns, num_heads: int) -> Mask:
    """The mask of `num_heads` heads of which some have patterns; the others see all.

    Raises:
        ValueError, TypeError: heads that there are not, what is no pattern.
    """
    known = _by_head(patterns, num_heads)
    given = [known.get(head, full()) for head in range(num_heads)]
    return per_head([offset(pattern) if isinstance(pattern, int) else pattern for pattern in given])


class FixedHeads(Mix):
    """Scores of 0 in some heads, whose weights are then even over what the mask allows. No parameters.

    Args:
        num_heads: H.
        heads: which are fixed.
    """

    def __init__(self, num_heads: int, heads: Sequence[int]) -> None:
        super().__init__()
        whole(self, num_heads=num_heads)
        if isinstance(heads, str) or not isinstance(heads, Sequence):
            refuse(self, "heads", "are none", repr(heads), "a sequence of ints", error=TypeError)
        for head in heads:
            whole(self, 0, most=num_heads - 1, heads=head)
        self.num_heads, self.heads = num_heads, tuple(heads)

    def forward(self, z: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "B H t s"]:
        fixed = torch.tensor([head in self.heads for head in range(self.num_heads)], device=z.device)
        return z.masked_fill(fixed[:, None, None], 0.0)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


@CARD.fills()
def pattern_heads(
    num_heads: int, *, patterns: Patterns | None = None, fixed: Sequence[int] | None = None
) -> dict[str, Any]:
    """The mask of the heads with patterns, and what makes the weights of some even.

    Args:
        patterns: head -> what it may see, a mask or n for the token n later; or such one after another, None for a
            head without. Default {2: 1, 3: -1}. All others see what the mask of the call allows: give it
            `pattern_mask` of the ids.
        fixed: heads without scores, with even weights over what they may see; default those of an n.
    """
    if patterns is None:
        if num_heads < 4:
            refuse("pattern_heads", "num_heads", "is too small", num_heads, "4 at least, or patterns of your own")
        patterns = {2: 1, 3: -1}
    known = _by_head(patterns, num_heads)
    if fixed is None:
        fixed = [head for head, pattern in known.items() if isinstance(pattern, int)]
    mixes = FixedHeads(num_heads, fixed)
    return {
        **({"mask": pattern_mask(known, num_heads)} if known else {}),
        **({"score_mix": mixes} if mixes.heads else {}),
    }
