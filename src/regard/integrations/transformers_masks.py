"""The masks that transformers asks for, as regard's: with their structure, and formed only if somebody looks inside.

A model hands its attention layers one mask, made of a rule (causal, sliding, packed, ...), a padding mask and the
lengths that its cache tells. Rules are recognised where transformers made them; any other is formed as a tensor.
Positions are counted as transformers counts them: from the first token of the sequence, dropped keys included.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.utils._pytree import tree_map_only

from regard.masks import Mask, blocks, causal, documents, full, padding
from regard.masks.algebra import And
from regard.masks.patterns import Diagonals


@dataclass(frozen=True, eq=False)
class Structure:
    """A mask over positions, and which keys it is about."""

    mask: Mask | None
    """None: every query sees every key."""
    first_key: int
    """Position of the first key held."""
    keys: int
    """How many keys count; those behind are slots that a static cache has not filled yet."""
    keep: Bool[Tensor, "B S"] | None
    """The padding in `mask`, over all positions; True = a real token. None where there is none."""


class LazyMask(Tensor):
    """Bool (B, 1, T, S), True = may attend: formed when any operation touches it, which then gives a plain tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    structure: Structure | None
    for_original: Callable[[], Any]
    _form: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, int, int, int],
        device: torch.device | str,
        structure: Structure | None,
        form: Callable[[], Tensor],
        for_original: Callable[[], Any],
    ) -> "LazyMask":
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=torch.device(device))
        self.structure, self._form, self.for_original = structure, form, for_original
        return self

    def formed(self) -> Bool[Tensor, "B 1 T S"]:
        """The tensor."""
        return self._form()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyMask({tuple(self.shape)}, {None if self.structure is None else self.structure.mask!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(LazyMask, LazyMask.formed, (args, kwargs or {}))
        return function(*args, **kwargs)


@torch.compiler.disable
def lazy_mask(for_original: Callable[..., Any], **asked: Any) -> LazyMask:
    """What transformers' mask interface is answered. `for_original(**asked)` is what it would have got instead."""
    from transformers.masking_utils import sdpa_mask

    if "q_length" not in asked:
        raise ImportError('swap: needs transformers 5.4 or later; pip install "regard[transformers]"')
    # A static cache counts in place, and has gone on by the time that the mask is formed.
    asked = {name: value.clone() if name.endswith("_offset") and isinstance(value, Tensor) else value
             for name, value in asked.items()}  # fmt: skip
    never = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    shape = (asked["batch_size"], 1, asked["q_length"], asked["kv_length"])
    return LazyMask(
        shape,
        asked.get("device", "cpu"),
        structure(**asked),
        _once(lambda: sdpa_mask(**{**asked, **never})),
        _once(lambda: for_original(**asked)),
    )


def formed_when_compiled(for_original: Callable[..., Any], **asked: Any) -> Tensor:
    """`lazy_mask`; while torch.compile looks, the tensor, which it can trace, over every slot of a static cache.

    For mechanisms to which places are nothing: the tensor doesn't tell where the queries stand.
    """
    if not torch.compiler.is_compiling():
        return lazy_mask(for_original, **asked)
    from transformers.masking_utils import sdpa_mask

    formed: Tensor = sdpa_mask(**{**asked, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})  # type: ignore[assignment]
    return formed


def structure(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Structure | None:
    """The mask as regard's, or None where the rule is not known."""
    rule = recognise(mask_function)
    if rule is None:
        return None
    last = int(q_offset) + q_length  # the position after the last query's
    if rule.is_causal:
        keys = last - kv_offset
        if not 0 <= keys <= kv_length:
            return None
    elif rule == full() or last == kv_offset + kv_length:
        keys = kv_length
    else:  # regard's last query stands at the last key, this one does not
        return None
    keep = None
    if attention_mask is not None:
        end = kv_offset + keys
        keep = attention_mask[:, :end].bool()
        keep = torch.nn.functional.pad(keep, (0, end - keep.shape[1]))
        keep = None if bool(keep[:, kv_offset:].all()) else keep
    mask = rule if keep is None else padding(keep) if rule == full() else rule & padding(keep)
    return Structure(None if mask == full() else mask, kv_offset, keys, keep)


def recognise(rule: Callable[..., Any]) -> Mask | None:
    """The mask that a rule of transformers stands for; None for any other function.

    Rules are closures of transformers.masking_utils. Their names and the values they close over are read; nothing is
    changed. That the reading is right is tested, and shows in every swap's self-check.
    """
    from transformers import masking_utils

    if rule is masking_utils.causal_mask_function:
        return causal()
    if rule is masking_utils.bidirectional_mask_function:
        return full()
    if not inspect.isfunction(rule) or rule.__module__ != masking_utils.__name__:
        return None
    return _closure(rule.__qualname__.partition(".")[0], inspect.getclosurevars(rule).nonlocals)


def _closure(kind: str, held: Any) -> Mask | None:
    if kind == "and_masks":
        parts = [recognise(part) for part in held["mask_functions"]]
        kept = [part for part in parts if part is not None and part != full()]
        if any(part is None for part in parts):
            return None
        return And(tuple(kept)) if len(kept) > 1 else kept[0] if kept else full()
    if kind == "sliding_window_overlay":
        return Diagonals(held["sliding_window"] - 1, math.inf, 1, f"last({held['sliding_window']})")
    if kind == "sliding_window_bidirectional_overlay":
        return Diagonals(held["sliding_window"], held["sliding_window"], 1, f"near({held['sliding_window']})")
    if kind == "chunked_overlay":
        return None if held["left_padding"].any() else blocks(held["chunk_size"])
    if kind == "packed_sequence_mask_function":
        return documents(held["packed_sequence_mask"])
    if kind == "remap_positions_for_packed_sequence":
        # It stands beside the packed rule: within one sequence, positions differ as the places do.
        rule = recognise(held["mask_function"])
        return rule if rule is not None and rule.is_shift_invariant else None
    return None


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    made: list[Any] = []

    def get() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return get
