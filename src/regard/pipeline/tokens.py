"""What layers do with their tokens whatever they mix them by: key padding, and NaN that stays where it may be seen."""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from regard.checks import refuse
from regard.kernels.finite import reaches
from regard.masks import Mask, causal, padding
from regard.masks.tensors import Documents, Kept, Lengths, Packed, unpacked
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
    if isinstance(mask, Mask) and unpacked(mask)[0] is not None:
        lacks_packed(who)
    got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
    refuse(who, "mask", "can only hide keys", got, f"masks.padding or bool ({B}, {S}){_packs(who, mask)}")


def _packs(who: object, mask: object) -> str:
    """What to write for documents by their ids, where the layer takes packed ones."""
    told = type(mask) is Documents and "packed" in getattr(who, "supports", ())
    return ", or masks.packed(cu_seqlens) for documents that lie end to end" if told else ""


def key_mask(
    who: Any, mask: Mask | Tensor | None, x: Float[Tensor, "B S M"]
) -> tuple[Bool[Tensor, "B S"] | None, Packed | None]:
    """The padding as `key_padding` gives it, and the documents that are packed in each row (None: one).

    Causality may stand beside them where the layer has it anyway.
    """
    packed, others = unpacked(mask)
    if packed is None:
        return key_padding(who, mask, x), None
    lacks_packed(who)
    packed.fits(who, x.shape[1])
    if packed.batch not in (1, len(x)):
        refuse(who, "mask", "has another batch than x", f"{packed.batch} rows of documents", f"{len(x)}, or 1 for all")
    keep = None
    for part in others:
        if not (isinstance(part, Mask) and part == causal() and getattr(who, "causal", False)):
            shows = key_padding(who, part, x)
            keep = shows if keep is None or shows is None else keep & shows
    return keep, packed.to(x.device)


def lacks_packed(who: Any) -> None:
    """Refuse packed documents where the card doesn't claim them, with its reason."""
    if "packed" not in getattr(who, "supports", ()):
        why = getattr(who, "lacks", {}).get("packed", "it has no way to keep them apart")
        wanted = f"one document a row (no 'packed' on its card: {why})"
        refuse(who, "mask", "packs documents, which this mechanism does not take", "masks.packed", wanted)


def apart(
    layer: Any, x: Float[Tensor, "B T M"], packed: Packed, keep: Bool[Tensor, "B T"] | None
) -> Float[Tensor, "B T M"]:
    """What `layer(x, mask=)` gives for each document by itself; 0 behind the last one.

    Documents become rows, with those up to twice as long in one batch: as many calls as there are sizes of two powers,
    and at most half of what is computed is padding.
    """
    B, T = x.shape[:2]
    nowhere, flat = B * T, F.pad(x.flatten(0, 1), (0, 0, 0, 1))  # one token more, which fills up rows
    real = None if keep is None else F.pad(keep.flatten(), (0, 1))
    batches: dict[int, list[tuple[int, int]]] = {}
    for row, lengths in enumerate(packed.lengths * (B if packed.batch == 1 else 1)):
        for start, n in zip(itertools.accumulate(lengths, initial=row * T), lengths, strict=False):
            if n:
                batches.setdefault((n - 1).bit_length(), []).append((start, n))
    outs, places = [], []
    for batch in batches.values():
        first, length = torch.tensor(batch, device=x.device).unbind(1)
        order = torch.arange(max(n for _, n in batch), device=x.device)
        at = torch.where(order < length[:, None], first[:, None] + order, nowhere)
        kept = at < nowhere if real is None else real[at]
        filled = real is not None or len({n for _, n in batch}) > 1
        outs.append(layer(flat[at], mask=padding(kept) if filled else None).flatten(0, 1))
        places.append(at.flatten())
    if not outs:
        return torch.zeros_like(x) + flat[-1]
    out = torch.cat(outs)
    return out.new_zeros(nowhere + 1, out.shape[1]).index_copy(0, torch.cat(places), out)[:-1].unflatten(0, (B, T))


def shown(who: object, x: Float[Tensor, "B t M"], mask: Tensor | None) -> Float[Tensor, "B t M"]:
    """The tokens of a step with zeros for hidden ones, whatever they hold; a mask that is no (B, t) bool is refused."""
    if mask is None:
        return x
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        refuse(who, "mask", "can only hide tokens of this step", got, f"bool {tuple(x.shape[:2])}, True = a real token")
    return x.masked_fill(~mask[..., None], 0)


def quarantine(
    x: Float[Tensor, "B T M"], *, always: bool = False
) -> tuple[Float[Tensor, "B T M"], Bool[Tensor, "B T"] | None]:
    """Tokens that hold NaN or inf set to zero, and which they were (None: none).

    Padding may hold anything, and 0 * NaN would reach every sum and weight gradient. Where nobody may look (while
    compiling, for one) it is done unasked. In eager calls off the CPU a look would wait for the device: there x goes
    through as it is, unless it is asked for `always`: what is packed beside other documents.
    """
    if readable(x) and not (always and not x.is_cpu):
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
