"""What every analysis looks at first: attention maps, one a layer, and which tokens count."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.checks import fits, refuse


def floats(who: object, axes: str, sizes: Mapping[str, int] | None = None, /, **tensors: Any) -> dict[str, Any]:
    """`fits`, and floating point."""
    known = fits(who, axes, sizes, **tensors)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            refuse(who, name, "has the wrong dtype", tensor.dtype, "floating point", error=TypeError)
    return known


def each_layer(
    who: object, attention: Sequence[Float[Tensor, "B _H T S"]], axes: str = "B _H T S"
) -> list[Float[Tensor, "B _H T S"]]:
    """The maps in at least fp32. Refused in the name of the caller where they are none, or differ in a letter."""
    expected = f"one map ({', '.join(axes.split())}) a layer"
    if isinstance(attention, Tensor) or not isinstance(attention, Sequence):
        refuse(who, "attention", "has the wrong type", type(attention).__name__, expected, error=TypeError)
    if not attention:
        refuse(who, "attention", "is empty", attention, expected)
    sizes: dict[str, int] = {}
    for layer, maps in enumerate(attention):
        name = f"attention[{layer}]"
        sizes = floats(who, axes, sizes, **{name: maps})
        if not maps.numel():
            refuse(who, name, "is empty", tuple(maps.shape), "one at least of each axis")
    return [maps.to(torch.promote_types(maps.dtype, torch.float32)) for maps in attention]


def all_heads(
    who: object, attention: Sequence[Float[Tensor, "B H T S"]], axes: str = "B H T S"
) -> Float[Tensor, "L B H T S"]:
    """The maps of all layers in one tensor, for what has one number for each of L layers and H heads."""
    return torch.stack(each_layer(who, attention, axes))


def marks(
    who: object, name: str, mask: Bool[Tensor, "B T"] | None, batch: int, length: int, like: Tensor
) -> Bool[Tensor, "B T"]:
    """A mask of tokens; all of them where there is none."""
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=like.device)
    fits(who, "B T", {"B": batch, "T": length}, **{name: mask})
    if mask.dtype != torch.bool:
        refuse(who, name, "has the wrong dtype", mask.dtype, "torch.bool", error=TypeError)
    return mask.to(like.device)
