"""Offset heads: those that attend to a neighbour at a fixed displacement, whatever the content.

Along a sequence d = -1 is the token before: previous-token heads of language models are offset heads too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import number, whole
from regard.inspect.analyses._maps import all_heads
from regard.inspect.analyses.attention_distance import Grid, by_displacement, displaced, placed

CARD = Card(
    "offset_heads",
    equation="""share[d] = mean over queries that have a token at d of A_(i, i+d)
d* = argmax_d share[d], |d| <= reach        mean offset = sum_d aligned[d] d / sum_d aligned[d]
offset head: d* is not 0, and share[d*] > 1/2""",
    papers=(
        Paper(
            "Teaching Matters: Investigating the Role of Supervision in Vision Transformers",
            "Walmer, Suri, Gupta, Shrivastava",
            2022,
            "2212.03862",
            "abstract; the authors' code (analysis/attention_metrics.py); they are called Offset Local Attention Heads "
            "there, and found by looking at aligned maps and mean offsets",
        ),
    ),
    protocol="Analysis",
    supports=set(),
    cost=Cost("B*H*T**2", ""),
    claim="There are heads that attend to an adjacent token in a fixed direction; they are told from local and from "
    "even ones: tests/inspect/analyses/test_offset_heads.py::test_finds_the_direction_of_each_head.",
    differs=(
        "The share and its threshold are this library's; the authors look at the maps.",
        "Mean offsets are in patches, theirs in sides of the grid less one.",
    ),
    verified="reconstructed",
)


class OffsetHeads(NamedTuple):
    """For each of L layers and H heads."""

    found: Bool[Tensor, "L H"]
    """Which are offset heads."""
    offset: Int[Tensor, "L H 2"]
    """d* as (down, right); along a sequence (0, how many tokens later)."""
    share: Float[Tensor, "L H"]
    """What a query gives to the token at d*, on average."""
    mean: Float[Tensor, "L H 2"]
    """The mean displacement (down, right), which a head that looks everywhere has near 0."""


@CARD.function
def offset_heads(
    attention: Sequence[Float[Tensor, "B H T T"]],
    *,
    grid: Grid = None,
    extra_tokens: int = 0,
    reach: int = 1,
    threshold: float = 0.5,
) -> OffsetHeads:
    """Which heads attend to a fixed displacement.

    Args:
        attention: the weights of each layer, with as many heads in all.
        grid: height and width of the image in patches; None for a sequence.
        extra_tokens: how many tokens before the patches have no place.
        reach: how many steps down or right a displacement may have; 1 for adjacent tokens only.
        threshold: the share above which a head counts.

    Raises:
        ValueError, TypeError: maps that are not (B, H, T, T) floats, options out of range.
    """
    maps, places = placed("offset_heads", attention, grid, extra_tokens)
    all_heads("offset_heads", maps)
    whole("offset_heads", reach=reach)
    number("offset_heads", least=0, below=1, threshold=threshold)
    sums = torch.stack([by_displacement(one.mean(0), places) for one in maps])
    middle = torch.tensor([n // 2 for n in sums.shape[-2:]], device=sums.device)
    axes = [torch.arange(n, device=sums.device) - n // 2 for n in sums.shape[-2:]]
    steps = torch.cartesian_prod(*axes).reshape(*sums.shape[-2:], 2)
    mean = torch.einsum("lhuv,uvd->lhd", sums, steps.to(sums)) / len(places)

    share = sums / displaced(places).to(sums)
    far = steps.abs().amax(-1) > reach
    best = share.masked_fill(far, -torch.inf).flatten(2).max(-1)
    offset = torch.stack([best.indices // sums.shape[-1], best.indices % sums.shape[-1]], -1) - middle
    return OffsetHeads((best.values > threshold) & offset.ne(0).any(-1), offset, best.values, mean)
