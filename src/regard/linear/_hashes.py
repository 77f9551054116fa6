"""Hashes of vectors by the signs of random projections, and tables of what collides."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Codes(NamedTuple):
    """What m hashes of `length` signs make of queries and keys: numbers below 2^length."""

    queries: Int[Tensor, "B H T m"]
    keys: Int[Tensor, "B H S m"]
    length: int


def table_sum(codes: Codes, values: Float[Tensor, "B H S F"]) -> Float[Tensor, "B H T F"]:
    """The mean over hashes of the sum of what collides: each hash has a table with a row for each code."""
    (B, H, _, F_), m = values.shape, codes.keys.shape[3]
    out = values.new_zeros(B, H, codes.queries.shape[2], F_)
    for at_query, at_key in zip(codes.queries.unbind(-1), codes.keys.unbind(-1), strict=True):
        empty = values.new_zeros(B, H, 2**codes.length, F_)
        table = empty.scatter_add(2, at_key.unsqueeze(-1).expand(-1, -1, -1, F_), values)
        out = out + table.gather(2, at_query.unsqueeze(-1).expand(-1, -1, -1, F_))
    return out / m


def codes_of(signs: Bool[Tensor, "*n m tau"]) -> Int[Tensor, "*n m"]:
    """sum_j 2^j of those that are true."""
    return (signs * 2 ** torch.arange(signs.shape[-1], device=signs.device)).sum(-1)


def random_planes(
    batch: int, heads: int, width: int, count: int, length: int, **at: Any
) -> Float[Tensor, "B H m tau D"]:
    """What `dense_codes` takes, Gaussian."""
    return torch.randn(batch, heads, count, length, width, **at)


def random_flips(batch: int, heads: int, width: int, count: int, length: int, **at: Any) -> Float[Tensor, "B H 3 P W"]:
    """What `fast_codes` takes, 1 or -1: W is a power of two, at least D, tau and 32."""
    W = 2 ** math.ceil(math.log2(max(width, length, 32)))
    return 2.0 * torch.randint(2, (batch, heads, 3, -(-count // (W // length)), W), **at) - 1


def dense_codes(x: Float[Tensor, "B H T D"], planes: Float[Tensor, "#B H m tau D"]) -> Int[Tensor, "B H T m"]:
    """On which side of each of m times tau planes."""
    flat = planes.flatten(2, 3).to(x.dtype)
    return codes_of((x @ flat.mT).unflatten(-1, planes.shape[2:4]) > 0)


def fast_codes(
    x: Float[Tensor, "B H T D"], flips: Float[Tensor, "#B H 3 P W"], length: int, count: int
) -> Int[Tensor, "B H T m"]:
    """The same by P random rotations to W >= D numbers, each three times flipped signs and a Hadamard transform."""
    W = flips.shape[-1]
    x = F.pad(x, (0, W - x.shape[3])).unsqueeze(3)
    for signs in flips.unbind(2):
        x = hadamard(x * signs.unsqueeze(2).to(x.dtype))
    each = W // length
    return codes_of(x[..., : each * length].unflatten(-1, (each, length)) > 0).flatten(-2)[..., :count]


def hadamard(x: Float[Tensor, "*n W"]) -> Float[Tensor, "*n W"]:
    """Of a power of two numbers, without a factor."""
    step = 1
    while step < x.shape[-1]:
        a, b = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x, step = torch.stack([a + b, a - b], -2).flatten(-3), 2 * step
    return x
