"""What a selection keeps: of the pairs, of the kernel's work, and of the attention."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from regard.checks import refuse
from regard.kernels.block_sparse import block_of
from regard.kernels.check import check_inputs
from regard.kernels.problem import dots
from regard.masks import Mask, full

PAIRS = 2**24
"""Scores looked at together."""


class Kept(NamedTuple):
    """Shares in [0, 1]; print it."""

    pairs: float
    """Of the query-key pairs that the mask allows, those kept."""
    blocks: float
    """Of the blocks that the block-sparse kernel would visit for the mask alone, those it still visits."""
    mass: Float[Tensor, "B H"]
    """Of the attention that full softmax would spread, what falls on kept pairs: the mean over queries."""
    least: Float[Tensor, "B H"]
    """The same of the query that loses most."""

    def __str__(self) -> str:
        mean, head, query = (float(share) for share in (self.mass.mean(), self.mass.min(), self.least.min()))
        return (
            f"keeps {self.pairs:.1%} of the pairs in {self.blocks:.1%} of the blocks, and {mean:.1%} of the attention "
            f"(worst head {head:.1%}, worst query {query:.1%})"
        )


@torch.no_grad()
def kept(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    selected: Mask,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
) -> Kept:
    """How much of the attention under `mask` (default: all pairs) `selected` keeps, and for how much of its work.

    Scores are formed some rows at a time. Queries that may see nothing do not count; without any, all shares are 1.
    """
    check_inputs(q, k, k)
    for name, value in (("selected", selected), ("mask", mask)):
        if not isinstance(value, Mask) and not (name == "mask" and value is None):
            refuse("kept", name, "has the wrong type", type(value).__name__, "a regard.masks.Mask", error=TypeError)
    (B, H, T, D), S = q.shape, k.shape[2]
    if 0 in (B, H, T, S):
        return Kept(1.0, 1.0, *(q.new_ones(B, H, dtype=torch.float64) for _ in range(2)))
    whole = full() if mask is None else mask
    chosen = whole & selected
    j, scale = torch.arange(S, device=q.device), D**-0.5 if scale is None else scale
    pairs = [0, 0]
    total, seen = q.new_zeros(B, H, dtype=torch.float64), q.new_zeros(B, H, dtype=torch.float64)
    least = q.new_ones(B, H, dtype=torch.float64)
    for i in torch.arange(S - T, S, device=q.device).split(max(1, PAIRS // max(1, B * H * S))):
        allowed, keep = (m.at(i, j).expand(B, H, -1, -1) for m in (whole, chosen))
        pairs = [pairs[0] + int(keep.sum()), pairs[1] + int(allowed.sum())]
        scores = dots(q[:, :, i - (S - T)], k).double() * scale
        of, all_ = (scores.masked_fill(~m, -math.inf).logsumexp(-1) for m in (keep, allowed))
        alive = allowed.any(-1)
        mass = torch.where(alive, (of - all_.masked_fill(~alive, 0.0)).exp(), 1.0)
        total, seen = total + mass.masked_fill(~alive, 0.0).sum(-1), seen + alive.sum(-1)
        least = torch.minimum(least, mass.amin(-1))
    block = block_of(chosen)
    visited, dense = (m.layout(T, S, block=block) for m in (chosen, whole))
    share = visited.block_density / dense.block_density if dense.num_blocks else 1.0
    mean = torch.where(seen > 0, total / seen.clamp(min=1), 1.0)
    return Kept(pairs[0] / pairs[1] if pairs[1] else 1.0, share, mean, least)
