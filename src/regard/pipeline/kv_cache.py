"""The key/value cache: an immutable value handed into `step` and back, over buffers that are written only once.

Appending writes behind the tokens already there and returns a new cache over the same buffers. If the same cache is
appended to twice (a beam, a retry), the second append copies first, so that neither sees the other's tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NoReturn

import torch
from jaxtyping import Int
from torch import Tensor

from regard.checks import called, refuse, whole
from regard.tracing import active

if TYPE_CHECKING:
    from regard.pipeline.kept import KeptCache
    from regard.pipeline.paged_cache import PagedKVCache


@dataclass(frozen=True, eq=False)
class KVCache:
    """Everything of the past that later queries read, by name; time is always the second to last axis.

    `k` (B, G, capacity, D), `v` (B, G, capacity, V), and for mechanisms that read more: `x` (B, capacity, M), the
    tokens, and `q` (B, H, capacity, D), the queries.
    """

    buffers: Mapping[str, Tensor]
    length: int = 0
    """Tokens seen so far."""
    window: int | None = None
    """Keep only the last `window` tokens: what a later query can still reach. None keeps all, up to the capacity."""
    written: list[int] = field(default_factory=lambda: [0], repr=False)
    """How far the shared buffers are filled, by any cache that shares them."""
    room: int = field(default=0, repr=False)
    """With a window: places in the memory behind the buffers, which show only what is kept; 0 = no more than that."""
    end: int = field(default=0, repr=False)
    """The place there behind the last token."""

    @property
    def kept(self) -> int:
        """Tokens still held."""
        return self.length if self.window is None else min(self.length, self.window)

    @property
    def capacity(self) -> int | None:
        """Most tokens it can hold; None = any number, as it forgets the oldest."""
        return None if self.window is not None else next(iter(self.buffers.values())).shape[-2]

    @property
    def batch_size(self) -> int:
        return next(iter(self.buffers.values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held now."""
        return sum(t.element_size() * t[..., :1, :].numel() * self.kept for t in self.buffers.values())

    def append(self, **new: Tensor) -> tuple[dict[str, Tensor], "KVCache"]:
        """All tokens held with the new ones behind them (each (..., kept + t, width)), and the cache that holds them.

        Raises ValueError on overflow, or if names, batch, widths, dtype or device differ from the buffers'.
        """
        check_fit(self, new, self.buffers)
        t = next(iter(new.values())).shape[-2]
        learns = torch.is_grad_enabled() and any(z.requires_grad for z in (*new.values(), *self.buffers.values()))
        if not learns and (found := self.ahead(t)) is not None:
            held, after = found
            for name, z in new.items():
                held[name].narrow(-2, held[name].shape[-2] - t, t).copy_(z)
            return held, after
        if self.window is not None:
            return self._slid(new, t, learns)
        capacity, end = self.capacity, self.length + t
        assert capacity is not None
        if end > capacity:
            overflow(self, t, self.length, capacity)
        if learns:
            # A graph may hold the old buffers: never write into them.
            buffers = {
                n: torch.cat([b[..., : self.length, :], new[n], b[..., end:, :]], -2) for n, b in self.buffers.items()
            }
        else:
            buffers = {n: b.clone() for n, b in self.buffers.items()}
            for name, z in new.items():
                buffers[name].narrow(-2, self.length, t).copy_(z)
        held = {n: b.narrow(-2, 0, end) for n, b in buffers.items()}
        return held, KVCache(buffers, end, None, [end])

    def ahead(self, t: int) -> tuple[dict[str, Tensor], "KVCache"] | None:
        """All tokens held and room for t more behind them, to be written at once, and the cache that then holds them;
        None where there is no such room that is nobody else's. For tokens that need no gradients."""
        if self.window is None:
            end = self.length + t
            if self.written[0] != self.length or end > next(iter(self.buffers.values())).shape[-2] or self._sealed():
                return None
            self.written[0] = end
            return {n: b.narrow(-2, 0, end) for n, b in self.buffers.items()}, KVCache(
                self.buffers, end, None, self.written
            )
        if not self._slides() or self.end + t > self.room or self.written[0] != self.end:
            return None
        before, after, held = self.kept, min(self.length + t, self.window), {}
        for n, b in self.buffers.items():
            held[n] = b.as_strided((*b.shape[:-2], before + t, b.shape[-1]), b.stride(), b.storage_offset())
        self.written[0] = end = self.end + t
        kept = {n: z.narrow(-2, before + t - after, after) for n, z in held.items()}
        return held, KVCache(kept, self.length + t, self.window, self.written, self.room, end)

    def _slides(self) -> bool:
        """Whether memory with more room than is shown may be made, and written to."""
        return not (torch.compiler.is_compiling() or active() or self._sealed())

    def _slid(self, new: Mapping[str, Tensor], t: int, learns: bool) -> tuple[dict[str, Tensor], "KVCache"]:
        """`append` where only a window is kept and there is no room behind it: what is kept moves to the front of new
        memory, into which later ones are written."""
        assert self.window is not None
        before, after, length = self.kept, min(self.length + t, self.window), self.length + t
        free = self._slides() and not learns
        held = {n: torch.cat([self.buffers[n], z], -2) for n, z in new.items()}
        first = before + t - after
        if not free or t > 1:  # many at once are no steps; what was seen of them is not kept alive
            kept = {n: z[..., first:, :].clone() for n, z in held.items()}
            return held, KVCache(kept, length, self.window, [length])
        room, kept = after + min(self.window // 2, after), {}
        for name, z in held.items():
            kept[name] = z.new_empty(*z.shape[:-2], room, z.shape[-1]).narrow(-2, 0, after)
            kept[name].copy_(z.narrow(-2, first, after))
        return held, KVCache(kept, length, self.window, [after], room, after)

    def fork(self) -> "KVCache":
        """A copy with buffers of its own."""
        return self._moved({n: b.clone() for n, b in self.buffers.items()})

    def reorder(self, index: Int[Tensor, " B2"]) -> "KVCache":
        """The cache of batch rows `index` (beam search); its batch is as long as the index."""
        check_rows(self, index)
        buffers = {n: b.index_select(0, index) for n, b in self.buffers.items()}
        return self._moved(buffers)

    def crop(self, length: int) -> "KVCache":
        """Forget all tokens after the first `length`."""
        whole(self, 0, most=self.length, length=length)
        if self.window is None:
            return replace(self, length=length)
        drop = self.length - length
        if drop and self.length > self.window:
            raise ValueError(
                f"KVCache: can't crop by {drop}: tokens before the last {self.window} are forgotten already; "
                "fork() the cache before the tokens you may take back"
            )
        return replace(self._moved({n: b[..., :length, :].clone() for n, b in self.buffers.items()}), length=length)

    def _moved(self, buffers: Mapping[str, Tensor]) -> "KVCache":
        """The same with buffers of its own."""
        return replace(self, buffers=buffers, written=[self.length], room=0, end=0)

    def _sealed(self) -> bool:
        """Whether the buffers were made under torch.inference_mode, outside of which nobody may write to them."""
        if torch.compiler.is_compiling():  # which can't ask; it makes its own buffers, or is handed some to write to
            return False
        return not torch.is_inference_mode_enabled() and any(b.is_inference() for b in self.buffers.values())


def overflow(who: object, t: int, held: int, capacity: int) -> NoReturn:
    """Refuse t tokens more than there is room for."""
    raise ValueError(
        f"{called(who)}: {t} new token{'s' * (t != 1)} exceed{'s' * (t == 1)} capacity {capacity} ({held} are held); "
        f"create it with capacity >= {held + t}"
    )


def check_rows(who: "KVCache | PagedKVCache | KeptCache", index: Tensor) -> None:
    """Refuse what does not name rows of the batch."""
    if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
        refuse(who, "index", "has the wrong shape or dtype", f"{index.dtype} {tuple(index.shape)}", "1-D integers")
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < who.batch_size:
        got = f"{int(index.min())} to {int(index.max())}"
        refuse(who, "index", "is out of range", got, f"rows of a batch of {who.batch_size}")


def check_fit(who: object, new: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
    """Refuse tokens that are not of the kind that is held: (batch, ..., tokens, width) of each name."""
    if new.keys() != held.keys():
        raise ValueError(f"{called(who)}: holds {sorted(held)}, got {sorted(new)}")
    for name, z in new.items():
        b = held[name]
        if (*z.shape[:-2], z.shape[-1]) != (*b.shape[:-2], b.shape[-1]):
            raise ValueError(
                f"{called(who)}: {name} of shape {tuple(z.shape)} does not fit buffers of {tuple(b.shape)}; batch, "
                "heads and width must match"
            )
        if z.dtype != b.dtype or z.device != b.device:
            here, there = f"{z.dtype} on {z.device}", f"{b.dtype} on {b.device}"
            raise ValueError(f"{called(who)}: {name} is {here}, the cache is {there}; they must match")
