"""What selectors share: which keys a mask hides from everybody, where tokens end, and means of blocks."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.kernels.blocks import in_blocks
from regard.masks import Mask, causal, full
from regard.masks.algebra import And
from regard.masks.tensors import Kept, Lengths


def hides_keys_only(mask: Mask | None) -> bool:
    """Whether the mask is made of causality and padding alone, so that past keys are there for all or for nobody."""
    return all(part in (causal(), full()) or isinstance(part, Kept | Lengths) for part in _parts(mask))


def real_keys(mask: Mask | None, S: int, device: torch.device) -> Bool[Tensor, "#B 1 S"] | None:
    """The keys that the padding in the mask leaves; None where there is no padding."""
    real: Tensor | None = None
    for part in _parts(mask):
        if isinstance(part, Kept | Lengths) and S:
            last = torch.arange(S, device=device)
            keep = part.at(last[-1:], last)[:, :, 0]
            real = keep if real is None else real & keep
    return real


def ends(real: Bool[Tensor, "b 1 S"]) -> Int[Tensor, "b 1"]:
    """The number of tokens up to the last real one of each row."""
    return (real * torch.arange(1, real.shape[2] + 1, device=real.device)).amax(2)


def softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Over the last axis; 0 where nothing is allowed."""
    some = allowed.any(-1, keepdim=True)
    return scores.masked_fill(~allowed & some, -math.inf).softmax(-1).masked_fill(~allowed, 0.0)


def block_means(
    z: Float[Tensor, "B H T D"], counts: Bool[Tensor, "b 1 T"], block: int
) -> tuple[Float[Tensor, "B H n D"], Bool[Tensor, "b 1 n"]]:
    """The mean of each block over what counts in it, 0 where nothing does; and whether anything does."""
    many = in_blocks(counts, block, 2).sum(3)
    return in_blocks(z, block, 2).sum(3) / many.clamp(min=1)[..., None], many > 0


def _parts(mask: Mask | None) -> tuple[Mask, ...]:
    return () if mask is None else mask.parts if isinstance(mask, And) else (mask,)
