"""A search through halved branches: about the best of many blocks, for the scores of a few."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.kernels.blocks import among
from regard.tracing import exporting, readable

Stands = Literal["first", "center", "last"]

ROUNDS = 24
"""Of a search whose length nobody may look at."""


def tree_topk(
    scores_of: Callable[[Int[Tensor, "*n c"]], Float[Tensor, "*n c"]],
    num_blocks: Int[Tensor, "*n"],
    keep: int,
    *,
    representative: Stands = "center",
    most: int | None = None,
) -> Int[Tensor, "*n keep"]:
    """About the `keep` best of `num_blocks` blocks, by 2 keep log2(num_blocks / keep) scores; or all there are.

    Args:
        scores_of: the scores of these blocks.
        num_blocks: for each search; where it is 0, what comes back means nothing.
        representative: which block of a branch is scored.
        most: no number of blocks is greater; None looks at them.

    Returns:
        Blocks in their order; some may be there twice.
    """
    edges = num_blocks[..., None] * torch.arange(keep + 1, device=num_blocks.device)
    edges = edges.div(keep, rounding_mode="floor")
    first, end = edges[..., :-1], edges[..., 1:]
    most = int(num_blocks.max()) if most is None else most
    for halved in range(ROUNDS if exporting() else max(0, math.ceil(math.log2(max(most, 1) / keep)))):
        middle = first + (end - first).div(2, rounding_mode="floor")
        firsts, ends_ = torch.stack([first, middle], -1).flatten(-2), torch.stack([middle, end], -1).flatten(-2)
        half = (ends_ - firsts).div(2, rounding_mode="floor")
        stands = {"first": firsts, "center": firsts + half, "last": ends_ - 1}[representative]
        stands = torch.minimum(stands.clamp(min=0), (num_blocks[..., None] - 1).clamp(min=0))
        scores = scores_of(stands).masked_fill(ends_ <= firsts, -math.inf)
        best = _best(scores, keep)
        wide = (num_blocks > keep * 2**halved)[..., None]  # branches are wider than 1, as planned
        first, end = (torch.where(wide, z.gather(-1, best), now) for z, now in ((firsts, first), (ends_, end)))
    return first


def _best(scores: Float[Tensor, "*n c"], keep: int) -> Int[Tensor, "*n keep"]:
    """Where the `keep` best stand, in their order; of equals the first. NaN is as good as anything."""
    if not readable(scores) or not scores.numel():
        return scores.argsort(dim=-1, descending=True, stable=True)[..., :keep].sort().values
    taken = among(scores.masked_fill(scores.isnan(), math.inf), keep)
    return taken.flatten(0, -2).nonzero()[:, 1].view(*scores.shape[:-1], keep)
