"""Offset heads: those that attend to a neighbour at a fixed displacement, whatever the content.

    share[d] = mean over queries that have a token at d of A_(i, i+d)        d* = argmax_d share[d], |d| <= reach
    offset head: d* is not 0, and share[d*] > 1/2        mean offset = sum_d aligned[d] d / sum_d aligned[d]

Walmer, Suri, Gupta, Shrivastava 2022, "Teaching Matters: Investigating the Role of Supervision in Vision Transformers"
(https://arxiv.org/abs/2212.03862), which calls them Offset Local Attention Heads: abstract and the authors' code read
(analysis/attention_metrics.py). They are found there by looking at aligned maps and mean offsets.
Differs from the paper: the share and its threshold are ours; mean offsets are in patches, theirs in sides of the grid
less one. Along a sequence d = -1 is the token before: previous-token heads of language models are offset heads too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard._former import Card, Cost, Paper, register
from regard.inspect.analyses.attention_distance import Grid, _by_displacement, displaced, placed


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
    if reach < 1 or not 0 <= threshold < 1:
        raise ValueError(f"offset_heads: reach must be at least 1, threshold from 0 to 1 (got {reach}, {threshold})")
    if len({one.shape[1] for one in maps}) > 1:
        raise ValueError("offset_heads: layers have different numbers of heads; expected as many in all")
    sums = torch.stack([_by_displacement(one.mean(0), places) for one in maps])
    middle = torch.tensor([n // 2 for n in sums.shape[-2:]], device=sums.device)
    axes = [torch.arange(n, device=sums.device) - n // 2 for n in sums.shape[-2:]]
    steps = torch.cartesian_prod(*axes).reshape(*sums.shape[-2:], 2)
    mean = torch.einsum("lhuv,uvd->lhd", sums, steps.to(sums)) / len(places)

    share = sums / displaced(places).to(sums)
    far = steps.abs().amax(-1) > reach
    best = share.masked_fill(far, -torch.inf).flatten(2).max(-1)
    offset = torch.stack([best.indices // sums.shape[-1], best.indices % sums.shape[-1]], -1) - middle
    return OffsetHeads((best.values > threshold) & offset.ne(0).any(-1), offset, best.values, mean)


CARD = register(
    Card(
        name="offset_heads",
        family="inspect",
        gist="Heads that attend to a neighbour at a fixed displacement, on images or sequences.",
        equation="share[d] = mean over queries that have a token at d of A_(i, i+d)\n"
        "offset head: the greatest share, |d| <= reach, is not at d = 0 and exceeds 1/2",
        paper=Paper(
            "Teaching Matters: Investigating the Role of Supervision in Vision Transformers",
            "Walmer, Suri, Gupta, Shrivastava",
            2022,
            "2212.03862",
            "abstract; the authors' code",
        ),
        build=offset_heads,
        protocol="Analysis",
        supports=frozenset(),
        cost=Cost("B*H*T**2", ""),
        claim="There are heads that attend to an adjacent token in a fixed direction; they are told from local and "
        "from even ones in tests/inspect/analyses/test_offset_heads.py.",
        differs=(
            "The share and its threshold are this library's; the authors look at the maps.",
            "Mean offsets are in patches, theirs in sides of the grid.",
        ),
        verified="reconstructed",
    )
)
