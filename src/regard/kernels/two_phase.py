"""One query per row against stretches of a pool of keys, some of which several rows share: softmax in two phases.

    1. for every run of stretches that the same n > 1 rows share: one product of their n queries with its keys
    2. for every row: its own remaining stretches
    each gives m = max s, z = sum exp(s - m), o = sum exp(s - m) v;  merged by m' = max m, z' = sum exp(m - m') z, ...

Exact for every row, and shared keys are read once. Differentiable. `triton_decode` does the same on GPUs.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from regard.checks import checked
from regard.kernels import few


class Shares(NamedTuple):
    """How rows lie in the pool."""

    shared: list[tuple[Tensor, list[slice]]]
    """Rows, and the stretches of the pool that they all read."""
    own: list[list[slice]]
    """The stretches that each row reads alone."""


class Partial(NamedTuple):
    """Softmax over some of the keys, before it is divided: largest score, sum of exponentials, sum of values."""

    m: Float[Tensor, "G N R 1"]
    z: Float[Tensor, "G N R 1"]
    o: Float[Tensor, "G N R V"]


@checked()
def two_phase(
    q: Float[Tensor, "N H D"], k: Float[Tensor, "G P D"], v: Float[Tensor, "G P V"], shares: Shares, *, scale: float
) -> Float[Tensor, "N H V"]:
    """softmax(q k^T scale) v of each row over its stretches; a row without any gives 0. Sums in at least float32."""
    (N, H, D), G, V = q.shape, k.shape[0], v.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = (q.to(wide) * scale).view(N, G, H // G, D).transpose(0, 1)
    m = grouped.new_full((G, N, H // G, 1), -math.inf)
    sofar = Partial(m, torch.zeros_like(m), grouped.new_zeros(G, N, H // G, V))
    for rows, stretches in shares.shared:
        part = over(grouped[:, rows].flatten(1, 2), k, v, stretches)
        part = Partial(*(z.unflatten(1, (len(rows), -1)) for z in part))
        merged = merge(Partial(*(z[:, rows] for z in sofar)), part)
        sofar = Partial(*(z.index_copy(1, rows, new) for z, new in zip(sofar, merged, strict=True)))
    alone = [over(grouped[:, row], k, v, stretches) for row, stretches in enumerate(shares.own)]
    if alone:
        sofar = merge(sofar, Partial(*(torch.stack(z, 1) for z in zip(*alone, strict=True))))
    out = sofar.o / sofar.z.masked_fill(sofar.z == 0, 1.0)
    return out.transpose(0, 1).reshape(N, H, V).to(q.dtype)


def over(
    q: Float[Tensor, "G n D"], k: Float[Tensor, "G P D"], v: Float[Tensor, "G P V"], stretches: Sequence[slice]
) -> Partial:
    """Scaled queries against some stretches of the pool, read where they lie."""
    if not stretches:
        m = q.new_full((*q.shape[:2], 1), -math.inf)
        return Partial(m, torch.zeros_like(m), q.new_zeros(*q.shape[:2], v.shape[2]))
    if (read := _read(q, k, v, stretches)) is not None:
        return read
    s = [q @ k[:, at].to(q.dtype).mT for at in stretches]
    m = torch.cat([part.amax(-1, keepdim=True) for part in s], -1).amax(-1, keepdim=True)
    e = [(part - m).exp() for part in s]
    z, o = e[0].sum(-1, keepdim=True), e[0] @ v[:, stretches[0]].to(q.dtype)
    for part, at in zip(e[1:], stretches[1:], strict=True):
        z, o = z + part.sum(-1, keepdim=True), o + part @ v[:, at].to(q.dtype)
    return Partial(m, z, o)


def _read(q: Tensor, k: Tensor, v: Tensor, stretches: Sequence[slice]) -> Partial | None:
    """The same by the kernel that reads keys and values once, where that is for them."""
    parts = []
    for at in stretches:
        if (found := few.with_lse(q, k[:, at], v[:, at])) is None:
            return None
        out, lse = found[0], found[1].unsqueeze(-1)
        parts.append(Partial(lse, torch.ones_like(lse), out))
    return reduce(merge, parts)


def merge(a: Partial, b: Partial) -> Partial:
    """Softmax over the keys of both."""
    m = torch.maximum(a.m, b.m)
    finite = m.masked_fill(m == -math.inf, 0.0)
    x, y = (a.m - finite).exp(), (b.m - finite).exp()
    return Partial(m, x * a.z + y * b.z, x * a.o + y * b.o)
