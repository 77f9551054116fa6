"""Pattern relevance: how much of its attention each head spends on the pairs of a stated pattern.

People look at the maps of important heads (`head_importance`), state a pattern, and keep it where important heads
spend more on it than others do. `regard.heads.pattern_heads` then gives it to a model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import fits, refuse
from regard.inspect.analyses._maps import all_heads, marks
from regard.masks import Mask

CARD = Card(
    "pattern_relevance",
    equation="""GR_h = mean over inputs of (1 / T) sum_ij A_h(i, j) [P(i, j)]
chance = the same of even attention
t = (mean GR of important heads - mean GR of the others) / sqrt(s1^2 / n1 + s2^2 / n2)""",
    papers=(
        Paper(
            "Human Guided Exploitation of Interpretable Attention Patterns in Summarization and Topic Segmentation",
            "Li, Xiao, Xing, Wang, Murray, Carenini",
            2022,
            "2112.05364",
            "abstract; the rest of how patterns are found is recalled: the code that was read only injects them",
        ),
    ),
    protocol="Analysis",
    supports=set(),
    cost=Cost("B*H*T**2", ""),
    claim="A head that was given a pattern spends all its attention there, others what chance gives: "
    "tests/inspect/analyses/test_pattern_relevance.py::test_a_pattern_is_found_where_it_was_put.",
    differs=(
        "Padding is left out by `valid`, and T counts what is left.",
        "Chance, and Welch's t as the measure of significance, are this library's.",
    ),
    verified="reconstructed",
)


class PatternRelevance(NamedTuple):
    """For each of L layers and H heads."""

    relevance: Float[Tensor, "L H"]
    """GR: the share of a query's attention, mean over queries, then over inputs."""
    chance: Float[Tensor, ""]
    """GR of even attention over what is no padding."""

    def significance(self, important: Bool[Tensor, "L H"]) -> Float[Tensor, ""]:
        """Welch's t of important heads against the others; above about 2 a pattern is worth keeping.

        Args:
            important: which heads are, say the upper third by `head_importance`; two at least, and two others.

        Raises:
            ValueError, TypeError: another shape or dtype, fewer than two heads on a side.
        """
        fits("significance", "L H", dict(zip("LH", self.relevance.shape, strict=True)), important=important)
        if important.dtype != torch.bool:
            refuse("significance", "important", "has the wrong dtype", important.dtype, "torch.bool", error=TypeError)
        mine, others = self.relevance[important], self.relevance[~important]
        if min(len(mine), len(others)) < 2:
            got = f"{len(mine)} and {len(others)} others"
            refuse("significance", "important", "marks too few or too many heads", got, "two at least of each")
        spread = mine.var() / len(mine) + others.var() / len(others)
        return (mine.mean() - others.mean()) / spread.sqrt()


@CARD.function
def pattern_relevance(
    attention: Sequence[Float[Tensor, "B H T T"]],
    pattern: Mask | Bool[Tensor, "#B T T"],
    *,
    valid: Bool[Tensor, "B T"] | None = None,
) -> PatternRelevance:
    """How much each head attends to the pairs of a pattern.

    Args:
        attention: the weights of each layer, (B, H, T, T), as many heads in all; a trace's `weights`.
        pattern: P, a mask of `regard.masks` or True where it holds.
        valid: which tokens are no padding; default all.

    Raises:
        ValueError, TypeError: maps that are not (B, H, T, T) floats, a pattern of other sizes or that differs by head.
    """
    who = "pattern_relevance"
    maps = all_heads(who, attention, "B H T T")
    B, T = maps.shape[1], maps.shape[-1]
    keep = marks(who, "valid", valid, B, T, maps)
    holds = _pairs(pattern, B, T, maps.device) & keep[:, None]
    counts = keep.sum(-1)
    if not bool(counts.all()):
        refuse(who, "valid", "marks no token of an input", counts.tolist(), "one at least of each")
    rows = keep.to(maps.dtype) / counts[:, None]
    shares = torch.einsum("lbhij,bij,bi->lh", maps, holds.to(maps.dtype), rows) / B
    chance = (holds.sum(-1) * rows).sum(-1) / counts
    return PatternRelevance(shares, chance.mean())


def _pairs(pattern: Mask | Tensor, B: int, T: int, device: torch.device) -> Bool[Tensor, "#B T T"]:
    """True where the pattern holds."""
    wanted = "a mask, or bools of shape (B, T, T)"
    if isinstance(pattern, Mask):
        if pattern.heads != 1 or pattern.batch not in (1, B):
            got = f"{pattern.batch} inputs, {pattern.heads} heads"
            refuse(
                "pattern_relevance", "pattern", "has other sizes", got, f"1 or {B} inputs and one pattern of all heads"
            )
        return pattern.dense(T, device=device)[:, 0]
    if not isinstance(pattern, Tensor) or pattern.dtype != torch.bool:
        got = str(pattern.dtype) if isinstance(pattern, Tensor) else type(pattern).__name__
        refuse("pattern_relevance", "pattern", "is none", got, wanted, error=TypeError)
    if pattern.ndim != 3 or pattern.shape[0] not in (1, B) or pattern.shape[1:] != (T, T):
        refuse("pattern_relevance", "pattern", "has the wrong shape", tuple(pattern.shape), f"({B}, {T}, {T})")
    return pattern.to(device)
