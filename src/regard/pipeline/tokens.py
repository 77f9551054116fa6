"""What layers do with their tokens whatever they mix them by: key padding, and NaN that stays where it may be seen."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.checks import refuse
from regard.kernels.problem import reaches
from regard.masks import Mask
from regard.masks.tensors import Kept, Lengths
from regard.tracing import readable


def key_padding(who: object, mask: Mask | Tensor | None, x: Float[Tensor, "B S M"]) -> Bool[Tensor, "B S"] | None:
    """Whichever form the padding came in, as (B, S), True = a real key; a mask that hides more raises ValueError."""
    B, S = x.shape[:2]
    if mask is None:
        return None
    if isinstance(mask, Kept | Lengths) and mask.batch in (1, B):
        at = torch.arange(S, device=x.device)
        return mask.at(at[-1:], at)[:, 0, 0].expand(B, -1) if S else x.new_ones(B, 0, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape in ((B, S), (B, 1, 1, S)):
        return mask.reshape(B, S)
    got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
    refuse(who, "mask", "can only hide keys", got, f"masks.padding or bool ({B}, {S})")


def shown(who: object, x: Float[Tensor, "B t M"], mask: Tensor | None) -> Float[Tensor, "B t M"]:
    """The tokens of a step with zeros for hidden ones, whatever they hold; a mask that is no (B, t) bool is refused."""
    if mask is None:
        return x
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        refuse(who, "mask", "can only hide tokens of this step", got, f"bool {tuple(x.shape[:2])}, True = a real token")
    return x.masked_fill(~mask[..., None], 0)


def quarantine(x: Float[Tensor, "B T M"]) -> tuple[Float[Tensor, "B T M"], Bool[Tensor, "B T"] | None]:
    """Tokens that hold NaN or inf set to zero, and which they were (None: none).

    Padding may hold anything, and 0 * NaN would reach every sum and weight gradient. Where nobody may look (while
    compiling, for one) it is done unasked. In eager calls off the CPU a look would wait for the device: there x goes
    through as it is.
    """
    if readable(x):
        if not x.is_cpu:
            return x, None
        with torch.no_grad():
            if math.isfinite(float(x.sum(dtype=torch.float64))):
                return x, None
    bad = ~x.detach().isfinite().all(-1)
    return x.masked_fill(bad[..., None], 0.0), bad


def spoil(
    out: Float[Tensor, "B T M"],
    bad: Bool[Tensor, "B T"] | None,
    bad_source: Bool[Tensor, "B S"] | None,
    allowed: Mask | None,
) -> Float[Tensor, "B T M"]:
    """NaN in every row that was bad itself or may see a bad token of its source. The last T of S positions ask."""
    if bad is None and bad_source is None:
        return out
    hit = out.new_zeros(out.shape[:2], dtype=torch.bool) if bad is None else bad
    if bad_source is None:
        return out.masked_fill(hit[..., None], math.nan)
    T, S = out.shape[1], bad_source.shape[1]
    j = torch.arange(S, device=out.device)
    heads = 1 if allowed is None else allowed.heads
    marked = bad_source[:, None].expand(-1, heads, -1)
    (seen,) = reaches(allowed, torch.arange(S - T, S, device=out.device), j, marked)
    hit = hit | seen.any(1)
    return out.masked_fill(hit[..., None], math.nan)
