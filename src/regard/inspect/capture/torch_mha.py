"""torch.nn.MultiheadAttention: queries, keys and values are projected again from what it was called with."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.checks import refuse
from regard.inspect.capture.recorder import Recorder
from regard.inspect.layers import LayerTrace

_NAMES = (
    "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal"
)  # fmt: skip


def record(recorder: Recorder, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Record one call."""
    call = dict(zip(_NAMES, args)) | kwargs
    query, key, value = (call[name] for name in _NAMES[:3])
    place = recorder.place(recorder.names[module], "self" if query is key else "cross")
    if not recorder.wants(place["index"]):
        return
    if module.bias_k is not None or module.add_zero_attn:
        got = f"add_bias_kv or add_zero_attn in {place['name']}"
        refuse("trace", "model", "has a layer that adds keys of its own, which are not read", got, "one without them")
    with torch.no_grad():
        query, key, value = (_batched(z, module.batch_first) for z in (query, key, value))
        q, k, v = (_heads(z, module.num_heads) for z in _projected(module, query, key, value))
        mask, bias = _mask(call, q.shape[0], module.num_heads, q.shape[2], k.shape[2], q.device)
        recorder.keep(LayerTrace(**place, q=q, k=k, v=v, scale=q.shape[-1] ** -0.5, mask=mask, bias=bias))


def _batched(z: Tensor, batch_first: bool) -> Float[Tensor, "B T M"]:
    if z.dim() == 2:
        return z[None]
    return z if batch_first else z.transpose(0, 1)


def _projected(module: nn.MultiheadAttention, *inputs: Tensor) -> list[Tensor]:
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return [F.linear(z, weight, bias) for z, weight, bias in zip(inputs, weights, biases)]


def _heads(z: Float[Tensor, "B T M"], H: int) -> Float[Tensor, "B H T D"]:
    return z.unflatten(-1, (H, -1)).transpose(1, 2)


def _mask(
    call: dict[str, Any], B: int, H: int, T: int, S: int, device: torch.device
) -> tuple[Bool[Tensor, "#B #H T S"] | None, Float[Tensor, "#B #H #T #S"] | None]:
    """Torch's masks are True where a key is hidden, or numbers to add."""
    mask, bias = None, None
    pairs, padding = call.get("attn_mask"), call.get("key_padding_mask")
    if pairs is not None:
        pairs = pairs.view(B, H, T, S) if pairs.dim() == 3 else pairs[None, None]
        mask, bias = _hidden_or_added(pairs)
    if padding is not None:
        padding = padding.view(B, 1, 1, S).expand(B, 1, T, S)
        hides, adds = _hidden_or_added(padding)
        mask = hides if mask is None else mask if hides is None else mask & hides
        bias = adds if bias is None else bias if adds is None else bias + adds
    return mask, bias


def _hidden_or_added(given: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if given.dtype == torch.bool:
        return ~given, None
    hidden = given == -torch.inf
    added = given.masked_fill(hidden, 0.0)
    return (~hidden if hidden.any() else None), (added if added.any() else None)
