"""What every analysis checks first: attention maps, one a layer."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def checked(
    name: str, attention: Sequence[Float[Tensor, "B _H T S"]], *, square: bool = False
) -> list[Float[Tensor, "B _H T S"]]:
    """The maps in at least fp32. ValueError or TypeError in the name of the caller where they are none."""
    if isinstance(attention, Tensor) or not isinstance(attention, Sequence):
        raise TypeError(f"{name}: attention is a {type(attention).__name__}; expected one map (B, H, T, S) a layer")
    if not attention:
        raise ValueError(f"{name}: attention is empty; expected one map (B, H, T, S) a layer")
    for layer, maps in enumerate(attention):
        if not isinstance(maps, Tensor) or not maps.is_floating_point():
            got = maps.dtype if isinstance(maps, Tensor) else type(maps).__name__
            raise TypeError(f"{name}: attention[{layer}] is {got}; expected a tensor of floats (B, H, T, S)")
        if maps.dim() != 4 or min(maps.shape) < 1:
            raise ValueError(f"{name}: attention[{layer}] has shape {tuple(maps.shape)}; expected (B, H, T, S)")
        B, _, T, S = maps.shape
        first = attention[0].shape
        if (first[0], first[2], first[3]) != (B, T, S):
            raise ValueError(
                f"{name}: attention[{layer}] has shape {tuple(maps.shape)}; expected the batch, queries and keys of "
                f"attention[0], {tuple(first)}"
            )
        if square and T != S:
            raise ValueError(f"{name}: attention[{layer}] has {T} queries and {S} keys; expected self-attention, T = S")
    return [maps.to(torch.promote_types(maps.dtype, torch.float32)) for maps in attention]


def all_heads(
    name: str, attention: Sequence[Float[Tensor, "B H T S"]], *, square: bool = False
) -> Float[Tensor, "L B H T S"]:
    """The maps of all layers in one tensor, for what has one number for each of L layers and H heads."""
    maps = checked(name, attention, square=square)
    for layer, one in enumerate(maps):
        if one.shape[1] != maps[0].shape[1]:
            raise ValueError(
                f"{name}: attention[{layer}] has {one.shape[1]} heads, attention[0] {maps[0].shape[1]}; expected as "
                "many in all layers"
            )
    return torch.stack(maps)


def marks(
    name: str, what: str, mask: Bool[Tensor, "B T"] | None, batch: int, length: int, like: Tensor
) -> Bool[Tensor, "B T"]:
    """A mask of tokens; all of them where there is none."""
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=like.device)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (batch, length):
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name}: {what} is {got}; expected bool ({batch}, {length})")
    return mask.to(like.device)
