"""The tokens just before each, for heads parts that read some of them (`HeadMap.reach`)."""

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F

from regard.masks import Mask
from regard.pipeline.paged_cache import PagedKVCache, State


def sees(mask: Mask | None, reach: int, first: int, T: int, device: torch.device) -> Bool[Tensor, "#B T reach"] | None:
    """Which of the tokens just before each of T, from place `first` on, the mask of a call lets it see, in any head."""
    if mask is None:
        return None
    i = torch.arange(first, first + T, device=device)[:, None]
    j = i - torch.arange(1, 1 + reach, device=device)
    b = torch.arange(mask.batch, device=device)[:, None, None, None]
    h = torch.arange(mask.heads, device=device)[:, None, None]
    allowed = mask.to(device)(b, h, i, j.clamp(min=0))  # before the first are zeros
    return allowed.expand(mask.batch, mask.heads, *j.shape).any(1)


def spread(
    bad: Bool[Tensor, "B T"] | None, sees: Bool[Tensor, "#B T reach"] | None, reach: int
) -> Bool[Tensor, "B T"] | None:
    """Tokens that are bad, or read one that is."""
    if bad is None:
        return None
    hit = bad
    for j in range(1, 1 + reach):
        read = F.pad(bad, (j, 0))[:, : bad.shape[1]]
        hit = hit | (read if sees is None else read & sees[..., j - 1])
    return hit


def before(state: State, n: int, x: Tensor) -> Tensor | None:
    """The last n tokens seen, or as many as there are; None also where the state doesn't fit, which appending says."""
    n, held = min(n, state.kept), state.buffers.get("x")
    if not n or held is None or state.batch_size != len(x) or held.shape[-1] != x.shape[-1]:
        return None
    if isinstance(state, PagedKVCache):
        return state.read("x", n)
    end = state.length if state.window is None else state.kept
    return held[:, end - n : end]
