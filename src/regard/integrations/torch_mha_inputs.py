"""What nn.MultiheadAttention is called with: refused in its own arguments' names, and its masks as regard's.

Torch's masks are the other way round than regard's: True hides.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from regard.checks import foreign, refuse, usual
from regard.kernels.check import check_terms
from regard.masks import Mask, causal, dense, padding
from regard.tracing import autocasts

WHO = "MultiheadAttention"


def check_tensors(
    query: Tensor, key: Tensor, value: Tensor, widths: tuple[int, int, int], like: Tensor, *, batch_first: bool
) -> None:
    """Refuse what is no three tensors of these widths, of the dtype and device of `like`, that belong together."""
    for (name, given), width in zip((("query", query), ("key", key), ("value", value)), widths):
        _check_tensor(name, given)
        ranks = f"2 or 3 axes, the last {width} wide"
        if given.dim() not in (2, 3) or given.shape[-1] != width:
            refuse(WHO, name, "has the wrong shape", tuple(given.shape), ranks)
        if given.dim() != query.dim():
            refuse(WHO, name, "has other axes than query", tuple(given.shape), f"{query.dim()}, as {_shape(query)} has")
        _check_kind(name, given, like)
    batch, length = (0, 1) if batch_first else (1, 0)
    if query.dim() == 3:
        for name, given in (("key", key), ("value", value)):
            if given.shape[batch] != query.shape[batch]:
                refuse(WHO, name, "has another batch than query", given.shape[batch], str(query.shape[batch]))
    else:
        length = 0
    if value.shape[length] != key.shape[length]:
        refuse(WHO, "value", "has another length than key", value.shape[length], str(key.shape[length]))


def static_length(static_k: Tensor | None, static_v: Tensor | None, shape: tuple[int, int, int], like: Tensor) -> int:
    """How many keys there are when these take the place of the projected ones; `shape` is (B H, S, D) of those."""
    rows, S, D = shape
    given = {name: z for name, z in (("static_k", static_k), ("static_v", static_v)) if z is not None}
    for name, z in given.items():
        _check_tensor(name, z)
        length = S if len(given) == 1 or z.dim() != 3 else given["static_k"].shape[1]
        if tuple(z.shape) != (rows, length, D):
            wanted = f"(batch times heads, keys, head width) = {(rows, length, D)}"
            refuse(WHO, name, "has the wrong shape", tuple(z.shape), wanted)
        _check_kind(name, z, like)
        S = length
    return S


def check_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, sizes: tuple[int, int, int, int], query: Tensor
) -> None:
    """Refuse masks that don't belong to B, H, T and S, or hold what nobody means."""
    B, H, T, S = sizes
    pairs = ((T, S), (B * H, T, S))
    keys = ((B, S),) if query.dim() == 3 else ((S,),)
    for name, given, shapes in (("attn_mask", attn_mask, pairs), ("key_padding_mask", key_padding_mask, keys)):
        if given is None:
            continue
        _check_tensor(name, given)
        if tuple(given.shape) not in shapes:
            refuse(WHO, name, "has the wrong shape", tuple(given.shape), " or ".join(map(str, shapes)))
        if given.device != query.device:
            refuse(WHO, name, "is on another device than query", given.device, str(query.device))
        if given.dtype != torch.bool and not given.is_floating_point():
            words = f"bool with True = hidden, or floating point; pass {name}.bool() if 1 means hidden"
            refuse(WHO, name, "has the wrong dtype", given.dtype, words, error=TypeError)
        if given.dtype != torch.bool:
            check_terms(WHO, name, given, f"{name}.bool() if 1 means hidden")


def masks_of(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    sizes: tuple[int, int, int, int],
    *,
    causal_hint: bool,
    more: int,
) -> tuple[Mask | None, Float[Tensor, "#B #H #T S"] | None, Bool[Tensor, "B S"] | None]:
    """The mask, what is added to the scores, and which keys the padding leaves; `more` keys behind are always seen."""
    B, H, T, S = sizes
    # Not hidden and with nothing added is 0 in torch's masks of both kinds.
    attn_mask, key_padding_mask = (z if z is None else F.pad(z, (0, more)) for z in (attn_mask, key_padding_mask))
    S += more
    mask: Mask | None = None
    bias = keep = None
    if attn_mask is not None and causal_hint and not more and T == S:
        mask = causal()
    elif attn_mask is not None:
        allowed, bias = _hidden(attn_mask.view(1, 1, T, S) if attn_mask.dim() == 2 else attn_mask.view(B, H, T, S))
        mask = dense(allowed)
    if key_padding_mask is not None:
        keep, added = _hidden(key_padding_mask.view(B, S))
        mask = padding(keep) if mask is None else mask & padding(keep)
        if added is not None:
            bias = added[:, None, None] if bias is None else bias + added[:, None, None]
    return mask, bias, keep


def _hidden(given: Tensor) -> tuple[Bool[Tensor, "..."], Tensor | None]:
    """What torch's mask leaves to be seen, and what it adds."""
    if given.dtype == torch.bool:
        return ~given, None
    hidden = given == -torch.inf
    return ~hidden, given.masked_fill(hidden, 0.0)


def _check_tensor(name: str, given: object) -> None:
    if not isinstance(given, Tensor):
        refuse(
            WHO, name, "has the wrong type", type(given).__name__, "a Tensor" + foreign(name, given), error=TypeError
        )
    usual(WHO, **{name: given})


def _check_kind(name: str, given: Tensor, like: Tensor) -> None:
    if given.dtype != like.dtype and not autocasts(given.device):
        refuse(WHO, name, "has another dtype than the layer", given.dtype, str(like.dtype), error=TypeError)
    if given.device != like.device:
        refuse(WHO, name, "is on another device than the layer", given.device, str(like.device))


def _shape(given: Tensor) -> str:
    return f"{tuple(given.shape)}"
