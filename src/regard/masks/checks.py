"""Refusals that the masks share. `what` is "function: argument"."""

import itertools
from typing import Any

import torch
from torch import Tensor

from regard.checks import foreign, refuse, whole


def integer(what: str, value: Any, *, least: int = 1) -> int:
    """`value` as an int >= `least`; True and 1.0 are no ints. A SymInt stands for an int while tracing."""
    who, _, name = what.partition(": ")
    whole(who, least, **{name: value})
    return value


def lengths(what: str, T: int, S: int | None) -> tuple[int, int]:
    """Numbers of queries and keys; S defaults to T."""
    T = integer(f"{what}: T", T, least=0)
    return T, T if S is None else integer(f"{what}: S", S, least=0)


def tensor(what: str, value: object, ndims: tuple[int, ...], kind: str) -> Tensor:
    """`value` as a tensor of one of the ranks, `kind` "bool" or "integer"."""
    who, _, name = what.partition(": ")
    ranks = " or ".join(map(str, ndims))
    wanted = f"{'an integer' if kind == 'integer' else 'a bool'} Tensor of {ranks} dimensions"
    if not isinstance(value, Tensor):
        wanted += foreign(name, value)
        refuse(who, name, "has the wrong type", type(value).__name__, wanted, error=TypeError)
    integers = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if not (value.dtype == torch.bool if kind == "bool" else integers):
        if kind == "bool" and integers:
            wanted += f'; pass {name}.bool() if 1 means "may be seen"'
        refuse(who, name, "has the wrong dtype", value.dtype, wanted, error=TypeError)
    if value.ndim not in ndims:
        refuse(who, name, "has the wrong shape", tuple(value.shape), wanted)
    return value


def cumulative(what: str, value: object) -> list[int]:
    """`value`, cumulative lengths (0, len_0, len_0 + len_1, ...), as numbers."""
    who, _, name = what.partition(": ")
    ends: list[int] = tensor(what, value, (1,), "integer").tolist()
    if ends[:1] != [0]:
        raise ValueError(f"{who}: {name} must start with 0 (got {ends[:1]})")
    for n, (before, after) in enumerate(itertools.pairwise(ends), start=1):
        if after < before:
            raise ValueError(f"{who}: {name} must be non-decreasing (got {before} then {after} at {n})")
    return ends
