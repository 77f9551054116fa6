"""The attention that keys receive, computed again from queries and keys, some rows at a time."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from regard.cache.evict import Asked

ELEMENTS = 2**22
"""About so many weights are formed at once."""


def rows(asked: Asked, last: int | None = None) -> Iterator[Float[Tensor, "B G R t n"]]:
    """Softmax weights of the last queries (default: all), in blocks of rows; R heads share a key head.

    A query sees the keys up to its own position, of those held. Padding has weights 0.
    """
    if asked.q is None:
        raise ValueError("rows: q is missing (got None); expected the queries of this call")
    k, wide = asked.k, torch.promote_types(asked.k.dtype, torch.float32)
    (B, H, T, D), (G, n) = asked.q.shape, k.shape[1:3]
    k = k.to(wide).mT
    first = 0 if last is None else max(T - last, 0)
    size = max(1, ELEMENTS // max(1, B * H * n))
    for start in range(first, T, size):
        q = asked.q[:, :, start : start + size].to(wide)
        t = q.shape[2]
        scores = (q.reshape(B, G, H // G * t, D) @ k).view(B, G, H // G, t, n) * asked.scale
        at = asked.at[:, None, start : start + size, None]
        unseen = ((asked.positions < 0)[:, :, None] | (asked.positions[:, :, None] > at))[:, :, None]
        yield scores.masked_fill(unseen, -torch.inf).softmax(-1).masked_fill(unseen, 0.0)
