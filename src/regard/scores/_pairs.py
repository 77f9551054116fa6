"""What mechanisms share that compute something wide for each pair of a query and a key."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.tracing import active, exporting

TILE_BYTES = 16 * 2**20
"""What is formed at once, in float32, stays within this."""


def in_pieces(
    run: Callable[[Tensor], Tensor], q: Float[Tensor, "B H t F"], numbers: int, *, rows: int | None = None
) -> Float[Tensor, "B H t s"]:
    """`run` on some query rows at a time, each piece computed again in backward instead of kept.

    Args:
        numbers: how many a row forms on the way.
        rows: how many at a time, instead of what fits.
    """
    rows = max(1, TILE_BYTES // (4 * numbers or 1)) if rows is None else rows
    if exporting() or rows >= q.shape[2]:
        return run(q)
    pieces = q.split(rows, 2)
    if not torch.is_grad_enabled() or active():  # torch.func knows no checkpoints
        return torch.cat([run(piece) for piece in pieces], 2)
    return torch.cat([checkpoint(run, piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces], 2)
