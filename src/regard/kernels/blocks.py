"""An axis cut into blocks of one size, and put together again; also where torch.export wants one graph for any length.

Exported, there is one block of zeros more, so that a graph never has a single block, which torch would hold to be so
for good; and blocks are gathered, as torch can't tell by itself that a length filled up can be divided.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.tracing import exporting, readable


def in_blocks(z: Tensor, size: int, dim: int) -> Tensor:
    """(.., T, ..) -> (.., blocks, size, ..): the last block filled up with zeros, or False."""
    T, behind = z.shape[dim], z.dim() - 1 - dim
    if exporting():
        z = F.pad(z, (0, 0) * behind + (0, 2 * size))
        return z[(slice(None),) * dim + (places(T, size, z.device),)]
    count = -(-T // size)
    short = count * size - T
    return (F.pad(z, (0, 0) * behind + (0, short)) if short else z).unflatten(dim, (count, size))


def places(T: int, size: int, device: torch.device) -> Tensor:
    """(blocks, size): which token stands where, as exported."""
    count = (T + 2 * size - 1) // size  # not "+ 1" behind it: torch divides by sums in no other way than by numbers
    return torch.arange(count, device=device)[:, None] * size + torch.arange(size, device=device)


def from_blocks(z: Tensor, T: int, dim: int) -> Tensor:
    """(.., blocks, size, ..) -> (.., T, ..)."""
    z = z.flatten(dim, dim + 1)
    return first(z, T, dim)


def first(z: Tensor, T: int, dim: int) -> Tensor:
    """The first T along an axis; exported not as a view, for which torch asks whether there are so many."""
    return z.index_select(dim, torch.arange(T, device=z.device)) if exporting() else z.narrow(dim, 0, T)


def greatest(z: Tensor, k: int, **options: bool) -> torch.return_types.topk:
    """The k greatest along the last axis, or all where it holds fewer. Exported, -inf stands in for those missing."""
    if exporting():
        return F.pad(z, (0, k), value=-math.inf).topk(k, **options)
    return z.topk(min(k, z.shape[-1]), **options)


def among(z: Tensor, k: int) -> Tensor:
    """Whether each is one of the k greatest along the last axis; of equals the first, however long the row is."""
    least = greatest(z, k).values[..., -1:]
    if not readable(z):
        return _first_of_equals(z, least, k)
    taken = ~(z < least)  # so is NaN
    tied = taken.sum(-1) > k  # a few rows
    taken[tied] = _first_of_equals(z[tied], least[tied], k)
    return taken


def _first_of_equals(z: Tensor, least: Tensor, k: int) -> Tensor:
    above, equal = (z > least) | z.isnan(), z == least
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= k - above.sum(-1, keepdim=True)))
