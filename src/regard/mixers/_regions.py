"""Combiner's patterns: summaries of regions, and one softmax over tokens and regions together.

Queries come scaled. `keep` is True at real tokens: (B, 1, T), beside q, k and v of shape (B, H, T, D).
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from regard.kernels.blocks import from_blocks, in_blocks
from regard.normalizers.softmax import softmax

Pool = Literal["max", "mean", "sum"]


class Regions(NamedTuple):
    """What queries see of each region; `real` False where it has no token."""

    key: Float[Tensor, "*n D"]
    value: Float[Tensor, "*n D"]
    real: Bool[Tensor, "*#n"]

    def along(self, change: Callable[[Tensor, int], Tensor]) -> "Regions":
        """Each of the three moved along an axis, which is counted from the end of `real`."""
        return Regions(change(self.key, -2), change(self.value, -2), change(self.real, -1))


def summary(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, pool: Pool) -> Regions:
    """f = pooled keys, g = pooled queries, s = softmax(g k^T) v: (.., D), each of the region (.., c, D)."""
    f, g = (_pooled(z, keep, pool) for z in (k, q))
    weights = softmax((k @ g[..., None])[..., 0], keep)
    return Regions(f, (weights[..., None, :] @ v)[..., 0, :], keep.any(-1))


def prefixes(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, pool: Pool) -> Regions:
    """Summaries of the tokens before each, itself not among them: (.., L, D) of the L regions."""
    real = keep.cumsum(-1)
    f, g = (_running(z, keep, real, pool) for z in (k, q))
    L = k.shape[-2]
    past = torch.ones(L, L, dtype=torch.bool, device=k.device).tril()
    s = softmax(g @ k.mT, past & keep[..., None, :]) @ v
    every = Regions(f, s, real > 0)
    return every.along(lambda z, axis: F.pad(z, (0, 0) * (-1 - axis) + (1, 0)).narrow(axis, 0, L))


def joint(parts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """One softmax over all (scores, allowed) of a query, cut into theirs again."""
    scores = torch.cat([z for z, _ in parts], -1)
    allowed = torch.cat([may.expand(z.shape) for z, may in parts], -1)
    return list(softmax(scores, allowed).split([z.shape[-1] for z, _ in parts], -1))


def _pooled(z: Tensor, keep: Tensor, pool: Pool) -> Tensor:
    hidden = ~keep[..., None]
    if pool == "max":
        top = z.masked_fill(hidden, -torch.inf).max(-2).values  # one position gets the gradient
        return top.masked_fill(~keep.any(-1)[..., None], 0)
    total = z.masked_fill(hidden, 0).sum(-2)
    return total if pool == "sum" else total / keep.sum(-1).clamp(min=1)[..., None]


def _running(z: Tensor, keep: Tensor, real: Tensor, pool: Pool) -> Tensor:
    hidden = ~keep[..., None]
    if pool == "max":
        return z.masked_fill(hidden, -torch.inf).cummax(-2).values.masked_fill((real == 0)[..., None], 0)
    total = z.masked_fill(hidden, 0).cumsum(-2)
    return total if pool == "sum" else total / real.clamp(min=1)[..., None]


# --- patterns


def lower(n: int, z: Tensor, diagonal: int = 0) -> Bool[Tensor, "n n"]:
    return torch.ones(n, n, dtype=torch.bool, device=z.device).tril(diagonal)


def fixed(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, w: int, pool: Pool, causal: bool, earlier: Regions | None = None
) -> tuple[Tensor, Regions]:
    """Own segment, and regions that are segments; `earlier` ones come before them. Gives all regions back."""
    T, (q, k, v), keep = q.shape[2], (in_blocks(z, w, 2) for z in (q, k, v)), in_blocks(keep, w, 2)
    own = summary(q, k, v, keep, pool)
    every = own if earlier is None else Regions(*(torch.cat(both, 2) for both in zip(earlier, own, strict=True)))
    n, m, before = q.shape[2], every.key.shape[2], 0 if earlier is None else earlier.key.shape[2]
    seen, near = every.real[:, :, None], keep[..., None, :]
    if causal:
        seen, near = (
            seen & (torch.arange(m, device=q.device) < before + torch.arange(n, device=q.device)[:, None]),
            near & lower(w, q),
        )
    local, far = joint([(q @ k.mT, near), (q @ every.key[:, :, None].mT, seen[..., None, :])])
    out = local @ v + far @ every.value[:, :, None]
    return from_blocks(out, T, 2), every


def logsparse(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, pool: Pool, first: int = 0) -> Tensor:
    """Of the tokens from `first` on; the blocks are those of all tokens."""
    T = int(q.shape[2])  # how many levels there are is for one length, compiled or traced
    i = torch.arange(first, T, device=q.device)
    asked = q[:, :, first:]
    parts = [((asked * k[:, :, first:]).sum(-1, keepdim=True), keep[:, :, first:, None])]
    values = [v[:, :, first:]]
    for level in range(max(T - 1, 0).bit_length()):
        c = 2**level
        low, high = max(first // c - 1, 0), max((T - 1) // c, 1)
        asks, keys, holds, real = (in_blocks(z[:, :, low * c : high * c], c, 2) for z in (q, k, v, keep))
        found = summary(asks, keys, holds, real, pool)
        before = (i // c - 1 - low).clamp(min=0)
        there = found.real[:, :, before] & (i // c % 2 == 1)
        parts.append(((asked * found.key[:, :, before]).sum(-1, keepdim=True), there[..., None]))
        values.append(found.value[:, :, before])
    out = torch.zeros_like(values[0])
    for weights, value in zip(joint(parts), values, strict=True):
        out = out + weights * value
    return out


def axial(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, w: int, pool: Pool) -> Tensor:
    """Rows are segments of w, columns the tokens at the same place of all rows."""
    T, (q, k, v), keep = q.shape[2], (in_blocks(z, w, 2) for z in (q, k, v)), in_blocks(keep, w, 2)
    n = q.shape[2]
    asks, keys, holds, real = (z.transpose(2, 3) for z in (q, k, v, keep))  # column by column
    columns = prefixes(asks, keys, holds, real, pool).along(lambda z, axis: z.transpose(2, 3))
    left = prefixes(q, k, v, keep, pool)
    asks, keys, holds, real = (z.flip(3) for z in (q, k, v, keep))
    right = prefixes(asks, keys, holds, real, pool).along(lambda z, axis: z.flip(3))
    above, other = lower(n, q, -1)[:, None], ~torch.eye(w, dtype=torch.bool, device=q.device)

    def rows(key: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """What stands in the query's column, of all rows above."""
        return (q.transpose(2, 3) @ key.transpose(2, 3).mT).transpose(2, 3), real.transpose(2, 3)[:, :, None] & above

    parts = [
        (q @ k.mT, keep[..., None, :] & lower(w, q)),
        (q @ columns.key.mT, columns.real[..., None, :] & other),
        *(rows(key, real) for key, real in ((k, keep), (left.key, left.real), (right.key, right.real))),
    ]
    own, aside, *others = joint(parts)
    out = own @ v + aside @ columns.value
    for weights, value in zip(others, (v, left.value, right.value), strict=True):
        out = out + (weights.transpose(2, 3) @ value.transpose(2, 3)).transpose(2, 3)
    return from_blocks(out, T, 2)


def rowmajor(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, w: int, key_of: Callable[[Tensor], Tensor]
) -> Float[Tensor, "B H T D"]:
    """`key_of` makes the rows' keys (B, H, T, D) of what attention within them gives, as wide."""
    T, (q, k, v), keep = q.shape[2], (in_blocks(z, w, 2) for z in (q, k, v)), in_blocks(keep, w, 2)
    n = q.shape[2]
    scores, real = q @ k.mT, keep[..., None, :]
    (within,) = joint([(scores, real)])
    value = within @ v
    key = in_blocks(key_of(from_blocks(value, T, 2)), w, 2)
    far = (q.transpose(2, 3) @ key.transpose(2, 3).mT).transpose(2, 3)
    above = keep.any(-1)[:, :, None, None] & lower(n, q, -1)[:, None]
    near, through = joint([(scores, real & lower(w, q)), (far, above)])
    out = near @ v + (through.transpose(2, 3) @ value.transpose(2, 3)).transpose(2, 3)
    return from_blocks(out, T, 2)
