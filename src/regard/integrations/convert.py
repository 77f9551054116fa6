"""Attention weights under three libraries' names.

separate   q_proj, k_proj, v_proj, o_proj                          regard, Hugging Face
timm       qkv, proj                                               queries, keys, values stacked in this order
torch      in_proj_weight, in_proj_bias, out_proj                  torch.nn.MultiheadAttention, stacked likewise
"""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

Names = Literal["separate", "timm", "torch"]
_STACKED = {"timm": "qkv.", "torch": "in_proj_"}
_OUT = {"separate": "o_proj.", "timm": "proj.", "torch": "out_proj."}


def convert(state: Mapping[str, Tensor], *, to: Names) -> dict[str, Tensor]:
    """One attention layer's state dict under other names; whichever it has now. Other entries stay as they are.

    Args:
        state: as `layer.state_dict()` gives it, without a prefix.

    Raises:
        ValueError: no names of these libraries, or grouped key heads, which only "separate" can hold.
    """
    if to not in get_args(Names):
        raise ValueError(f"convert: to must be one of {', '.join(get_args(Names))}, got {to!r}")
    now = _named(state)
    if now == to:
        return dict(state)
    out: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        parts = _parts(state, now, kind)
        if parts is None:
            continue
        if to == "separate":
            out |= {f"{name}_proj.{kind}": part for name, part in zip("qkv", parts)}
            continue
        if len({part.shape[0] for part in parts}) > 1:
            rows = [part.shape[0] for part in parts]
            raise ValueError(f"convert: {to!r} stacks equal projections, got {rows} rows of queries, keys and values")
        out[_STACKED[to] + kind] = torch.cat(parts)
    for kind in ("weight", "bias"):
        if (held := state.get(_OUT[now] + kind)) is not None:
            out[_OUT[to] + kind] = held
    used = {f"{_OUT[now]}{kind}" for kind in ("weight", "bias")} | set(_keys(now))
    return out | {name: t for name, t in state.items() if name not in used}


def _named(state: Mapping[str, Tensor]) -> Names:
    for names in get_args(Names):
        if _keys(names)[0] in state:
            return names
    raise ValueError(
        f"convert: expected q_proj.weight, qkv.weight or in_proj_weight among the names, got {sorted(state)[:8]}"
    )


def _keys(names: Names) -> list[str]:
    if names != "separate":
        return [_STACKED[names] + kind for kind in ("weight", "bias")]
    return [f"{name}_proj.{kind}" for kind in ("weight", "bias") for name in "qkv"]


def _parts(state: Mapping[str, Tensor], names: Names, kind: str) -> list[Tensor] | None:
    """Queries', keys' and values' part; a bias that only some have is 0 for the others."""
    if names != "separate":
        held = state.get(_STACKED[names] + kind)
        return None if held is None else list(held.chunk(3))
    found = [state.get(f"{name}_proj.{kind}") for name in "qkv"]
    if all(part is None for part in found):
        return None
    return [state[f"{n}_proj.weight"].new_zeros(state[f"{n}_proj.weight"].shape[0]) if p is None else p
            for n, p in zip("qkv", found)]  # fmt: skip
