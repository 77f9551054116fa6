"""What selectors share: which keys a mask hides from everybody, and where the tokens of a row end."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.masks import Mask, causal
from regard.masks.algebra import And
from regard.masks.tensors import Kept, Lengths


def hides_keys_only(mask: Mask | None) -> bool:
    """Whether the mask is made of causality and padding alone, so that past keys are there for all or for nobody."""
    return all(part == causal() or isinstance(part, Kept | Lengths) for part in _parts(mask))


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


def _parts(mask: Mask | None) -> tuple[Mask, ...]:
    return () if mask is None else mask.parts if isinstance(mask, And) else (mask,)
