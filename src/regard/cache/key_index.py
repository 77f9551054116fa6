"""Indices of keys: what finds the keys of the largest inner products with a query, and how many it looked at for that.

They hold numbers of keys, never keys, and are values: `insert` gives another one.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor

IndexKind = Literal["query_graph", "ivf", "flat"]
ELEMENTS = 2**22
"""About so many inner products are formed at once."""


class Index(Protocol):
    """Of the keys from one number to another."""

    def search(self, q: Float[Tensor, " D"], k: Float[Tensor, "S D"], n: int) -> tuple[list[int], int]:
        """The n best keys that it finds, best first, and how many inner products it formed."""
        ...

    def insert(self, k: Float[Tensor, "S D"], start: int, stop: int) -> "Index":
        """With the keys from start to stop."""
        ...


def make_index(kind: IndexKind, queries: Tensor, k: Tensor, start: int, stop: int, **options: Any) -> Index:
    """An index of the keys from start to stop."""
    if kind == "flat":
        return Flat(start, stop)
    build = QueryGraph.build if kind == "query_graph" else Lists.build
    index: Index = build(queries, k, start, stop, **options)
    return index


def top_keys(q: Tensor, k: Tensor, ids: Iterable[int], n: int) -> list[int]:
    """The n of these keys with the largest inner products, best first; of equals the first."""
    ids = torch.tensor(list(ids), dtype=torch.long, device=k.device)
    order = (k[ids] @ q).argsort(dim=0, descending=True, stable=True)[:n]
    found: list[int] = ids[order].tolist()
    return found


@dataclass(frozen=True)
class Flat:
    """Looks at all."""

    start: int
    stop: int

    def search(self, q: Tensor, k: Tensor, n: int) -> tuple[list[int], int]:
        return top_keys(q, k, range(self.start, self.stop), n), self.stop - self.start

    def insert(self, k: Tensor, start: int, stop: int) -> "Flat":
        return Flat(self.start, stop)


@dataclass(frozen=True, eq=False)
class Lists:
    """Inverted lists: each key stands in that of its best centre, and the best few lists are looked at."""

    centres: Float[Tensor, "C D"]
    lists: tuple[tuple[int, ...], ...]
    probes: int

    @classmethod
    def build(
        cls, queries: Tensor, k: Tensor, start: int, stop: int, *, lists: int, probes: int, rounds: int = 10
    ) -> "Lists":
        """Centres are means of the keys that like them best, found from keys at even distances."""
        keys = k[start:stop]
        n = min(lists, len(keys))
        centres = keys[torch.linspace(0, max(len(keys) - 1, 0), n, device=k.device).long()].clone()
        for _ in range(rounds if n else 0):
            to = (keys @ centres.mT).argmax(1)
            total = torch.zeros_like(centres).index_add_(0, to, keys)
            number = torch.bincount(to, minlength=n)[:, None]
            centres = torch.where(number > 0, total / number.clamp(min=1), centres)
        return cls(centres, ((),) * n, probes).insert(k, start, stop)

    def search(self, q: Tensor, k: Tensor, n: int) -> tuple[list[int], int]:
        best = (self.centres @ q).argsort(dim=0, descending=True, stable=True)[: self.probes].tolist()
        ids = sorted(i for c in best for i in self.lists[c])
        return top_keys(q, k, ids, n), len(ids)

    def insert(self, k: Tensor, start: int, stop: int) -> "Lists":
        if not len(self.centres):  # nothing was there to find centres of: one list of all
            centres = k[start : start + 1].clone()
            return replace(self, centres=centres, lists=(tuple(range(start, stop)),)) if stop > start else self
        lists = list(self.lists)
        for i, c in enumerate((k[start:stop] @ self.centres.mT).argmax(1).tolist(), start):
            lists[c] = (*lists[c], i)
        return replace(self, lists=tuple(lists))


@dataclass(frozen=True, eq=False)
class QueryGraph:
    """Keys are neighbours that one query found together.

    Values share their neighbours: each sees those below `stop`, and who writes a number that is taken copies first.
    """

    near: dict[int, list[int]]
    stop: int
    entry: int
    """The key that walks start at; -1 = there is none."""
    pool: int
    taken: list[int] = field(repr=False, default_factory=lambda: [0])
    """Up to which number any value has written."""

    @classmethod
    def build(
        cls, queries: Float[Tensor, "T D"], k: Tensor, start: int, stop: int, *, links: int, degree: int, pool: int
    ) -> "QueryGraph":
        """The graph of the keys from start to stop that these queries make."""
        keys, n = k[start:stop], stop - start
        near: list[set[int]] = [set() for _ in range(n)]
        if n and len(queries):
            size = max(1, ELEMENTS // n)
            blocks = [q @ keys.mT for q in queries.split(size)]
            best = torch.cat([b.argsort(dim=1, descending=True, stable=True)[:, :links] for b in blocks])
            hub = best[:, :1].expand_as(best)[:, 1:]
            pairs = torch.cat([torch.stack([hub, best[:, 1:]], -1), torch.stack([best[:, :-1], best[:, 1:]], -1)])
            for a, b in pairs.reshape(-1, 2).unique(dim=0).tolist():
                near[a].add(b)
                near[b].add(a)
            chosen = set(best.flatten().tolist())
        else:
            chosen = set()
        for i, some in enumerate(near):
            if len(some) > degree:
                near[i] = set(top_keys(keys[i], keys, sorted(some), degree))
        for i in range(n):
            if i not in chosen and n > 1:
                scores = keys @ keys[i]
                scores[i] = -torch.inf
                j = int(scores.argmax())
                near[i].add(j)
                near[j].add(i)
        entry = max(range(n), key=lambda i: (len(near[i]), -i), default=-1)
        numbered = {start + i: sorted(start + j for j in some) for i, some in enumerate(near)}
        return cls(numbered, stop, entry + start if n else -1, pool, [stop])

    def insert(self, k: Tensor, start: int, stop: int) -> Self:
        near, taken = self.near, self.taken
        if taken[0] != self.stop:  # another value went on from here
            near = {i: [j for j in some if j < self.stop] for i, some in near.items() if i < self.stop}
            taken = [self.stop]
        entry = self.entry
        first = min(near, default=start)
        for i in range(start, stop):
            near[i] = []
            if i > first:
                j = first + int((k[first:i] @ k[i]).argmax())
                near[i].append(j)
                near[j].append(i)
            entry = i if entry < 0 else entry
        taken[0] = stop
        return replace(self, near=near, stop=stop, entry=entry, taken=taken)

    def search(self, q: Tensor, k: Tensor, n: int) -> tuple[list[int], int]:
        if self.entry < 0:
            return [], 0
        size, entry = max(self.pool, n), self.entry
        seen = {entry}
        score = float(k[entry] @ q)
        best = [(score, -entry)]  # the worst of the best in front
        todo = [(-score, entry)]  # the best of those not looked around
        while todo:
            score, i = heapq.heappop(todo)
            if len(best) == size and (-score, -i) < best[0]:
                break
            new = [j for j in self.near[i] if j < self.stop and j not in seen]
            if not new:
                continue
            seen.update(new)
            for j, s in zip(new, (k[new] @ q).tolist(), strict=True):
                heapq.heappush(todo, (-s, j))
                heapq.heappush(best, (s, -j))
                if len(best) > size:
                    heapq.heappop(best)
        return [-i for _, i in sorted(best, reverse=True)[:n]], len(seen)
