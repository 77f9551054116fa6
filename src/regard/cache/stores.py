"""Where a policy puts the keys that it keeps: side by side for all heads, or each head's own number end to end.

A store is a value. Tokens are written behind those held, where there is room that no other value has written to.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.kinds import Kept
from regard.pipeline.kv_cache import KVCache


class Store(Protocol):
    """Keys, values and positions, read in the order of their positions; empty places stand in front."""

    @property
    def nbytes(self) -> int:
        """Of all tensors, room included."""
        ...

    @property
    def full(self) -> bool:
        """Whether no place is empty, so that no padding can be appended."""
        ...

    def read(self) -> Kept: ...

    def append(self, k: Tensor, v: Tensor, at: Tensor) -> "tuple[Kept, Store] | None":
        """More tokens for each head, and all there are with them; None where there is no room."""
        ...

    def reorder(self, index: Int[Tensor, " B2"]) -> "Store": ...


Makes = Callable[[Kept, int], Store]
"""Makes a store of what is kept, with room for so many more tokens a head."""


def joined(before: Kept, new: Kept) -> Kept:
    """The new ones behind those before."""
    k, v, at = (torch.cat([a, b.to(a.dtype)], 2) for a, b in zip(before[:3], new[:3], strict=True))
    return Kept(k, v, at, full=before.full and new.full)


def picked(kept: Kept, index: Int[Tensor, "B G n"], *, full: bool) -> Kept:
    """Those of these places, in this order; -1 is an empty one."""
    at = index.clamp(min=0)
    k, v = (z.gather(2, at[..., None].expand(-1, -1, -1, z.shape[3])) for z in kept[:2])
    positions = kept.positions.gather(2, at)
    return Kept(k, v, positions if full else positions.masked_fill(index < 0, -1), full=full)


@dataclass(frozen=True, eq=False)
class Padded:
    """As many places for every head."""

    cache: KVCache
    full: bool

    @classmethod
    def of(cls, kept: Kept, room: int) -> Self:
        n = kept.k.shape[2]
        buffers = {}
        for name, z in (("k", kept.k), ("v", kept.v), ("at", kept.positions.int()[..., None])):
            buffers[name] = z.new_empty(*z.shape[:2], n + room, z.shape[3])
            buffers[name][:, :, :n] = z
        return cls(KVCache(buffers, n, None, [n]), kept.full)

    @property
    def nbytes(self) -> int:
        return sum(z.element_size() * z.numel() for z in self.cache.buffers.values())

    def read(self) -> Kept:
        return self._kept({name: z[:, :, : self.cache.length] for name, z in self.cache.buffers.items()})

    def append(self, k: Tensor, v: Tensor, at: Tensor) -> tuple[Kept, "Padded"] | None:
        if self.cache.length + k.shape[2] > self.cache.buffers["k"].shape[2]:
            return None
        held, cache = self.cache.append(k=k, v=v, at=at.int()[..., None])
        return self._kept(held), replace(self, cache=cache)

    def reorder(self, index: Tensor) -> "Padded":
        return replace(self, cache=self.cache.reorder(index))

    def _kept(self, held: dict[str, Tensor]) -> Kept:
        return Kept(held["k"], held["v"], held["at"][..., 0], full=self.full)


@dataclass(frozen=True, eq=False)
class Ragged:
    """Each head's own number of keys, end to end: nothing is held for heads that have fewer."""

    k: Float[Tensor, "n D"]
    v: Float[Tensor, "n V"]
    at: Int[Tensor, " n"]
    start: Int[Tensor, "B G"]
    """Where each head's keys begin."""
    counts: Int[Tensor, "B G"]
    """How many each had when this was made."""
    most: int
    """The largest of them."""
    room: int
    """How many more each can take."""
    grown: int = 0
    """How many it has taken."""
    written: list[int] = field(default_factory=lambda: [0], repr=False)
    """How many any value has that shares the memory."""

    @property
    def full(self) -> bool:
        return False

    @classmethod
    def of(cls, kept: Kept, room: int) -> Self:
        real = kept.positions >= 0
        counts = real.sum(-1)
        ends = (counts + room).flatten().cumsum(0)
        start = (ends - (counts + room).flatten()).view_as(counts)
        places = (start[..., None] + real.cumsum(-1) - 1)[real]
        flat = [z.new_empty(int(ends[-1]) if len(ends) else 0, *z.shape[3:]) for z in kept[:3]]
        k, v, at = (f.index_copy(0, places, z[real]) for f, z in zip(flat, kept[:3], strict=True))
        return cls(k, v, at.int(), start, counts, int(counts.max()) if counts.numel() else 0, room)

    @property
    def nbytes(self) -> int:
        return sum(z.element_size() * z.numel() for z in (self.k, self.v, self.at, self.start, self.counts))

    def read(self) -> Kept:
        n = self.most + self.grown
        index = (self.counts + self.grown - n)[..., None] + torch.arange(n, device=self.k.device)
        at = (self.start[..., None] + index.clamp(min=0)).flatten()
        k, v, positions = (z[at].view(*index.shape, *z.shape[1:]) for z in (self.k, self.v, self.at))
        return Kept(k, v, positions.masked_fill(index < 0, -1))

    def append(self, k: Tensor, v: Tensor, at: Tensor) -> tuple[Kept, "Ragged"] | None:
        if self.grown == self.room or k.shape[2] != 1:
            return None
        new = [z.flatten(0, 2) for z in (k, v, at.int())]
        old, places = (self.k, self.v, self.at), (self.start + self.counts + self.grown).flatten()
        learns = torch.is_grad_enabled() and any(z.requires_grad for z in (*new, *old))
        if learns or self.written[0] != self.grown or (self.k.is_inference() and not torch.is_inference_mode_enabled()):
            held = [a.index_copy(0, places, b) for a, b in zip(old, new, strict=True)]
            after = replace(self, k=held[0], v=held[1], at=held[2], grown=self.grown + 1, written=[self.grown + 1])
        else:
            for a, b in zip(old, new, strict=True):
                a.index_copy_(0, places, b)
            self.written[0] += 1
            after = replace(self, grown=self.grown + 1)
        return after.read(), after

    def reorder(self, index: Tensor) -> "Ragged":
        k, v, at = (z.index_select(0, index) for z in self.read()[:3])
        return type(self).of(Kept(k, v, at), self.room - self.grown)
