"""A store of few bits: keys quantised channel by channel, values token by token, the newest of both as they are.

What is stored is a value and is never written into. Tokens of all heads begin at place 0; heads may have fewer than
others, and their groups are those that they would have alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from regard.cache.stores import joined, picked
from regard.kinds import Kept


class Codes(NamedTuple):
    """Levels of `bits` bits, several to a byte, with the scale and the lowest number of each group."""

    packed: UInt8[Tensor, "B G n b"]
    scale: Tensor
    low: Tensor


@dataclass(frozen=True)
class Form:
    """How numbers are stored."""

    bits: int
    group: int
    """So many tokens of a key channel, and channels of a value token, share a scale."""
    residual: int
    """R, a multiple of the group: R tokens' keys are quantised together, and values when R newer ones are there."""

    def keys(self, k: Float[Tensor, "B G M D"]) -> Codes:
        """Groups along tokens."""
        levels, scale, low = quantise(k.unflatten(2, (k.shape[2] // self.group, self.group)), 3, self.bits)
        return Codes(packed(levels.flatten(2, 3), self.bits), scale[:, :, :, 0], low[:, :, :, 0])

    def values(self, v: Float[Tensor, "B G N V"]) -> Codes:
        """Groups along channels; the last has as many as there are."""
        V = v.shape[3]
        size = min(self.group, V)
        full = torch.cat([v, v[..., -1:].expand(*v.shape[:3], -V % size)], 3)  # its last again changes no extreme
        levels, scale, low = quantise(full.unflatten(3, (full.shape[3] // size, size)), 4, self.bits)
        return Codes(packed(levels.flatten(3)[..., :V], self.bits), scale[..., 0], low[..., 0])

    def read_keys(self, codes: Codes, D: int) -> Float[Tensor, "B G M D"]:
        groups = codes.scale.shape[2]
        levels = unpacked(codes.packed, self.bits, D).unflatten(2, (groups, self.group))
        return dequantise(levels, codes.scale[:, :, :, None], codes.low[:, :, :, None]).flatten(2, 3)

    def read_values(self, codes: Codes, V: int) -> Float[Tensor, "B G N V"]:
        size = min(self.group, V)
        scale, low = (z.repeat_interleave(size, 3)[..., :V] for z in codes[1:])
        return dequantise(unpacked(codes.packed, self.bits, V), scale, low)


def quantise(x: Tensor, dim: int, bits: int) -> tuple[UInt8[Tensor, "..."], Tensor, Tensor]:
    """round((x - low) / scale), with low = min x and scale = (max x - min x) / (2^bits - 1) along an axis."""
    wide = torch.promote_types(x.dtype, torch.float32)
    low, top = x.amin(dim, keepdim=True), 2**bits - 1
    scale = ((x.amax(dim, keepdim=True).to(wide) - low.to(wide)) / top).to(x.dtype)
    step = scale.to(wide)
    levels = (x.to(wide) - low.to(wide)) / step.masked_fill(step == 0, 1.0)
    return levels.round().clamp(0, top).to(torch.uint8), scale, low


def dequantise(levels: UInt8[Tensor, "..."], scale: Tensor, low: Tensor) -> Tensor:
    """levels * scale + low."""
    wide = torch.promote_types(scale.dtype, torch.float32)
    return (levels.to(wide) * scale.to(wide) + low.to(wide)).to(scale.dtype)


def packed(levels: UInt8[Tensor, "*n D"], bits: int) -> UInt8[Tensor, "*n b"]:
    """8 / bits levels in a byte, the first lowest."""
    each, D = 8 // bits, levels.shape[-1]
    full = torch.nn.functional.pad(levels, (0, -D % each))
    shifts = bits * torch.arange(each, device=levels.device, dtype=torch.uint8)
    return (full.unflatten(-1, (full.shape[-1] // each, each)) << shifts).sum(-1, dtype=torch.uint8)


def unpacked(codes: UInt8[Tensor, "*n b"], bits: int, D: int) -> UInt8[Tensor, "*n D"]:
    """The D levels that were packed."""
    shifts = bits * torch.arange(8 // bits, device=codes.device, dtype=torch.uint8)
    return ((codes[..., None] >> shifts) & (2**bits - 1)).flatten(-2)[..., :D]


@dataclass(frozen=True, eq=False)
class Quantised:
    """A `Store` of few bits."""

    form: Form
    keys: Codes
    """Of each head's first tokens, a multiple of R of them."""
    values: Codes
    """Of all but each head's newest R."""
    k: Float[Tensor, "B G r D"]
    """The keys behind those."""
    v: Float[Tensor, "B G s V"]
    at: Int[Tensor, "B G n"]
    """The positions of all."""
    counts: Int[Tensor, "B G"] | None
    """How many tokens each head has; None: all have as many, and no place was ever empty."""

    @classmethod
    def of(cls, form: Form) -> "Callable[[Kept, int], Quantised]":
        """What makes such stores; room it needs none."""

        def make(kept: Kept, room: int) -> Quantised:
            if kept.full:
                return cls(form, *_split(form, kept.k, kept.v), kept.positions.int().clone(), None)
            R = form.residual
            real = kept.positions >= 0
            counts = real.sum(-1)
            n = int(counts.max()) if counts.numel() else 0
            kept = picked(kept, (~real).long().argsort(dim=-1, stable=True)[..., :n], full=True)
            M, N = counts // R * R, (counts - R).clamp(min=0)
            keys = form.keys(kept.k[:, :, : _most(M)])
            values = form.values(kept.v[:, :, : _most(N)])
            k, v = _from(kept.k, M, _most(counts - M)), _from(kept.v, N, _most(counts - N))
            return cls(form, keys, values, k, v, kept.positions.int(), counts)

        return make

    @property
    def full(self) -> bool:
        return self.counts is None

    @property
    def nbytes(self) -> int:
        held = (*self.keys, *self.values, self.k, self.v, self.at)
        counts = () if self.counts is None else (self.counts,)
        return sum(z.element_size() * z.numel() for z in (*held, *counts))

    def read(self) -> Kept:
        first_k = self.form.read_keys(self.keys, self.k.shape[3])
        first_v = self.form.read_values(self.values, self.v.shape[3])
        k, v = torch.cat([first_k, self.k], 2), torch.cat([first_v, self.v], 2)
        if self.counts is None:
            return Kept(k, v, self.at, full=True)
        n, R = _most(self.counts), self.form.residual
        index = torch.arange(n, device=k.device) - (n - self.counts)[..., None]
        k = _mended(k, first_k.shape[2], self.counts // R * R, index)
        v = _mended(v, first_v.shape[2], (self.counts - R).clamp(min=0), index)
        return Kept(k, v, self.at.gather(2, index.clamp(min=0)).masked_fill(index < 0, -1))

    def append(self, k: Tensor, v: Tensor, at: Tensor) -> tuple[Kept, "Quantised"] | None:
        """The new ones are attended to as they are, and quantised only afterwards."""
        attended = joined(self.read(), Kept(k, v, at.int(), full=self.full))
        if self.counts is not None:
            return (attended, self._appended(k, v, at)) if k.shape[2] == 1 else None
        keys, values, k, v = _split(self.form, torch.cat([self.k, k], 2), torch.cat([self.v, v], 2))
        keys, values = (_joined(a, b) for a, b in ((self.keys, keys), (self.values, values)))
        return attended, replace(self, keys=keys, values=values, k=k, v=v, at=attended.positions)

    def _appended(self, k: Tensor, v: Tensor, at: Tensor) -> "Quantised":
        """One more for each head where it is no padding."""
        assert self.counts is not None
        R, real, counts = self.form.residual, at[..., 0] >= 0, self.counts
        positions = _put(self.at[..., None], at.int()[..., None], counts, real)[..., 0]
        keys, values = self.keys, self.values
        rest = _put(self.k, k, counts % R, real)
        complete = real & ((counts + 1) % R == 0)
        if bool(complete.any()):
            block, M = self.form.keys(rest[:, :, :R]), counts // R * R
            size = self.form.group
            starts = (M, M // size, M // size)
            keys = Codes(*(_put(a, b, s, complete) for a, b, s in zip(keys, block, starts, strict=True)))
        newest, moved = self.v, real & (counts >= R)
        if bool(moved.any()):
            one = self.form.values(newest[:, :, :1])
            values = Codes(*(_put(a, b, counts - R, moved) for a, b in zip(values, one, strict=True)))
            newest = torch.where(moved[..., None, None], newest.roll(-1, 2), newest)
        newest = _put(newest, v, counts.clamp(max=R) - moved.long(), real)
        return replace(self, keys=keys, values=values, k=rest, v=newest, at=positions, counts=counts + real)

    def reorder(self, index: Int[Tensor, " B2"]) -> "Quantised":
        at = index.to(self.k.device)
        keys, values = (Codes(*(z.index_select(0, at) for z in codes)) for codes in (self.keys, self.values))
        k, v, positions = (z.index_select(0, at) for z in (self.k, self.v, self.at))
        counts = None if self.counts is None else self.counts.index_select(0, at)
        return replace(self, keys=keys, values=values, k=k, v=v, at=positions, counts=counts)


def _split(form: Form, k: Tensor, v: Tensor) -> tuple[Codes, Codes, Tensor, Tensor]:
    """What is to be quantised of tokens that all heads have, and the rest."""
    M, N = k.shape[2] // form.residual * form.residual, max(v.shape[2] - form.residual, 0)
    return form.keys(k[:, :, :M]), form.values(v[:, :, :N]), k[:, :, M:].clone(), v[:, :, N:].clone()


def _joined(a: Codes, b: Codes) -> Codes:
    return Codes(*(torch.cat([x, y], 2) if y.shape[2] else x for x, y in zip(a, b, strict=True)))


def _most(counts: Tensor) -> int:
    return int(counts.max()) if counts.numel() else 0


def _from(z: Float[Tensor, "B G n D"], start: Int[Tensor, "B G"], width: int) -> Tensor:
    """So many of each head's from its start; behind its end anything."""
    index = (start[..., None] + torch.arange(width, device=z.device)).clamp(max=max(z.shape[2] - 1, 0))
    return z.gather(2, index[..., None].expand(-1, -1, -1, z.shape[3]))


def _mended(z: Tensor, size: int, held: Int[Tensor, "B G"], index: Int[Tensor, "B G n"]) -> Tensor:
    """Tokens `index` of each head, whose first `held` stand from place 0 and the others from place `size`."""
    place = torch.where(index < held[..., None], index, index - held[..., None] + size).clamp(min=0)
    return z.gather(2, place[..., None].expand(-1, -1, -1, z.shape[3]))


def _put(z: Tensor, new: Tensor, start: Int[Tensor, "B G"], where: Tensor) -> Tensor:
    """A copy with the new ones at each head's start, for the heads told; as long as that needs."""
    if not bool(where.any()):
        return z
    width = new.shape[2]
    longest = int(start[where].max()) + width
    out = z.new_zeros(*z.shape[:2], max(longest, z.shape[2]), z.shape[3])
    out[:, :, : z.shape[2]] = z
    b, g = where.nonzero(as_tuple=True)
    out[b[:, None], g[:, None], start[where][:, None] + torch.arange(width, device=z.device)] = new[where]
    return out
