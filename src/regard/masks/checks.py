"""Refusals that the masks share."""

from typing import Any

import torch
from torch import Tensor


def integer(what: str, value: Any, *, least: int = 1) -> int:
    """`value` as an int >= `least`; True and 1.0 are no ints."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{what} must be an int >= {least} (got {value!r})")
    if value < least:
        raise ValueError(f"{what} must be an int >= {least} (got {value})")
    return value  # type: ignore[return-value]  # a SymInt stands for an int while tracing


def lengths(what: str, T: int, S: int | None) -> tuple[int, int]:
    """Numbers of queries and keys; S defaults to T."""
    T = integer(f"{what}: T", T, least=0)
    return T, T if S is None else integer(f"{what}: S", S, least=0)


def tensor(what: str, value: object, ndims: tuple[int, ...], kind: str) -> Tensor:
    """`value` as a tensor of one of the ranks, `kind` "bool" or "integer"."""
    article = "an" if kind == "integer" else "a"
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be {article} {kind} Tensor (got {type(value).__name__})")
    whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if not (value.dtype == torch.bool if kind == "bool" else whole):
        raise TypeError(f"{what} must be {article} {kind} Tensor (got {value.dtype})")
    if value.ndim not in ndims:
        ranks = " or ".join(map(str, ndims))
        raise ValueError(f"{what} must have {ranks} dimensions (got shape {tuple(value.shape)})")
    return value
