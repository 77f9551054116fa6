"""Caches that hold all keys and read few: what is common to policies that search anew for every query.

Such a policy saves the reading of keys, not their memory, which may be a slower one. `Reading` holds them, row by row
once rows are of different lengths, so that a policy need not know of padding.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any, Self, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.cache.stores import Padded, joined, picked
from regard.checks import number, refuse, whole
from regard.kinds import Kept, Turn


class Read(TypedDict, total=False):
    """The options of all such policies."""

    budget: int | float


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of one length: their keys and values, and what the policy remembers of them."""

    store: Padded
    own: Any
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return self.store.nbytes + int(getattr(self.own, "nbytes", 0))


@dataclass(frozen=True, eq=False)
class Parts:
    """The state of a policy in one layer: one part for the whole batch, or one a row."""

    parts: tuple[Part, ...]
    shape: tuple[int, int, int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(part.nbytes for part in self.parts)


class Reading:
    """A CachePolicy that reads `budget` of the keys held. Subclasses say `begin`, `prompt`, `find` and `reordered`.

    Args:
        budget: how many keys a head are read: a number, or as a float the share of the tokens seen.
    """

    def __init__(self, *, budget: int | float = 1024) -> None:
        if isinstance(budget, float):
            number(self, above=0, most=1, budget=budget)
        else:
            whole(self, budget=budget)
        self.budget = budget

    def begin(self) -> Any:
        """What is remembered of no tokens: a value."""
        raise NotImplementedError

    def prompt(self, own: Any, held: Kept, q: Float[Tensor, "B H t D"], scale: float) -> Any:
        """Take note of several tokens, which are the last of those held."""
        raise NotImplementedError

    def find(
        self, own: Any, held: Kept, q: Float[Tensor, "B H 1 D"], scale: float
    ) -> tuple[Bool[Tensor, "B G n"] | None, Any]:
        """Which keys the newest token reads (None: all), and what is remembered then."""
        raise NotImplementedError

    def reordered(self, own: Any, index: Int[Tensor, " B2"]) -> Any:
        """What is remembered, of batch rows `index`."""
        raise NotImplementedError

    def limit(self, seen: int) -> int:
        """How many keys may be read of so many tokens."""
        return self.budget if isinstance(self.budget, int) else max(1, int(seen * self.budget))

    def at_layer(self, n: int, layers: int) -> Self:
        """The same policy in every layer."""
        return self

    def with_budget(self, budget: int | float) -> Self:
        """The same with another budget."""
        other = copy.copy(self)
        other.budget = budget
        return other

    def init_state(self, batch_size: int, num_kv_heads: int, head_dim: int, *, value_dim: int | None = None) -> Parts:
        return Parts((), (batch_size, num_kv_heads, head_dim, value_dim or head_dim))

    def update(
        self,
        state: Parts,
        k: Float[Tensor, "B G t D"],
        v: Float[Tensor, "B G t V"],
        q: Float[Tensor, "B H t D"] | None = None,
        *,
        keep: Bool[Tensor, "B t"] | None = None,
        scale: float | None = None,
        turn: Turn | None = None,
    ) -> tuple[Kept, Parts]:
        B, G, t, D = k.shape
        if (B, G, D, v.shape[3]) != state.shape:
            refuse(self, "k", "does not fit the state", tuple(k.shape), f"(B, G, t, D, V) = {state.shape}")
        if q is None:
            refuse(self, "q", "is missing", None, "the queries of these tokens, by which keys are found")
        scale = D**-0.5 if scale is None else scale
        parts = state.parts or (self._empty(k, v),)
        if keep is None and len(parts) == 1:
            kept, part = self._taken(parts[0], k, v, q, scale, alone=t == 1)
            return kept, replace(state, parts=(part,))
        if len(parts) == 1 and B > 1:
            parts = tuple(self._rows(parts[0], torch.tensor([b], device=k.device)) for b in range(B))
        found, after = [], []
        for b, part in enumerate(parts):
            real = torch.ones(t, dtype=torch.bool, device=k.device) if keep is None else keep[b].to(k.device)
            row = [z[b : b + 1] for z in (k, v, q)]
            if t != 1:
                before, at = part.store.read(), part.length + real.int().cumsum(0) - 1
                at = at.masked_fill(~real, -1)[None, None].expand(1, G, t)
                found.append(joined(before, Kept(row[0], row[1], at.int(), full=bool(real.all()))))
            if bool(real.any()):
                ours = [z[:, :, real] for z in row]
                kept, part = self._taken(part, ours[0], ours[1], ours[2], scale, alone=t == 1)
            else:
                kept = Kept(row[0], row[1], torch.full((1, G, t), -1, dtype=torch.int32, device=k.device))
            if t == 1:
                found.append(kept)
            after.append(part)
        return _side_by_side(found), replace(state, parts=tuple(after))

    def reorder(self, state: Parts, index: Int[Tensor, " B2"]) -> Parts:
        """The state of batch rows `index`, such as beams."""
        shape = (len(index), *state.shape[1:])
        if len(state.parts) <= 1:
            return Parts(tuple(self._rows(part, index) for part in state.parts), shape)
        return Parts(tuple(state.parts[b] for b in index.tolist()), shape)

    def _taken(self, part: Part, k: Tensor, v: Tensor, q: Tensor, scale: float, *, alone: bool) -> tuple[Kept, Part]:
        """Rows of one length with tokens more, and what these read."""
        (B, G, t, _), n = k.shape, part.length
        at = torch.arange(n, n + t, dtype=torch.int32, device=k.device).expand(B, G, t)
        grown = part.store.append(k, v, at)
        if grown is None:
            held = joined(part.store.read(), Kept(k, v, at, full=True))
            store = Padded.of(held, (n + t) // 8 + 8)
            held = store.read()
        else:
            held, store = grown
        if t == 0:
            return held, part
        with torch.no_grad():
            if not alone:
                return held, Part(store, self.prompt(part.own, held, q, scale), n + t)
            chosen, own = self.find(part.own, held, q, scale)
        if chosen is None:
            return held, Part(store, own, n + 1)
        places = torch.where(chosen, torch.arange(n + 1, device=k.device), -1).sort(-1).values
        most = chosen.sum(-1)
        many = int(most.max()) if most.numel() else 0
        full = bool((most == many).all())
        return picked(held, places[..., n + 1 - many :], full=full), Part(store, own, n + 1)

    def _rows(self, part: Part, index: Tensor) -> Part:
        return replace(part, store=part.store.reorder(index), own=self.reordered(part.own, index))

    def _empty(self, k: Tensor, v: Tensor) -> Part:
        at = torch.empty(*k.shape[:2], 0, dtype=torch.int32, device=k.device)
        return Part(Padded.of(Kept(k[:, :, :0], v[:, :, :0], at, full=True), 0), self.begin(), 0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(budget={self.budget})"


def _side_by_side(rows: list[Kept]) -> Kept:
    """Rows of different numbers of keys as a batch, empty places in front."""
    many = max(row.k.shape[2] for row in rows)
    pads = [many - row.k.shape[2] for row in rows]
    k, v = (
        torch.cat([torch.nn.functional.pad(z, (0, 0, pad, 0)) for z, pad in zip(held, pads, strict=True)])
        for held in ([row.k for row in rows], [row.v for row in rows])
    )
    at = [torch.nn.functional.pad(row.positions, (pad, 0), value=-1) for row, pad in zip(rows, pads, strict=True)]
    return Kept(k, v, torch.cat(at), full=not any(pads) and all(row.full for row in rows))
