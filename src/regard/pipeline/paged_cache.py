"""A key/value cache in pages of a pool: what `KVCache` is, where sequences share what they have in common.

A row of the batch is a list of pages, which all states that came one from another share, as they share the buffers of a
`KVCache`: who appends at its end writes into it, who appends elsewhere (a beam, a retry, after a crop) takes a list of
its own, with the same full pages and a copy of the last, partly filled one. Pages go back to the pool with the last
state that holds them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Int
from torch import Tensor

from regard.checks import refuse, whole
from regard.kernels.pages import Pages, gather
from regard.pipeline.kv_cache import KVCache, check_fit, check_rows, overflow
from regard.pipeline.page_pool import PagePool


class Row:
    """The pages of one sequence; given back when nobody holds the row any more."""

    def __init__(self, pool: PagePool, pages: Sequence[int] | Tensor = (), first: int = 0, written: int = 0) -> None:
        self.pool, self.count = pool, 0
        self.first = first
        """The token with which the first page begins; those before are forgotten."""
        self.written = written
        """How many tokens any state has written."""
        with torch.inference_mode(False):  # else nobody could write to it outside of that
            self.table = torch.empty(8, dtype=torch.int32, device="cpu")
        self.extend(pages)

    @property
    def pages(self) -> Tensor:
        return self.table[: self.count]

    def extend(self, pages: Sequence[int] | Tensor) -> None:
        """Pages behind those that there are."""
        end = self.count + len(pages)
        if end > len(self.table):
            with torch.inference_mode(False):
                self.table = torch.cat([self.table, self.table.new_empty(end)])
        if len(pages):
            self.table[self.count : end] = torch.as_tensor(pages, dtype=torch.int32, device="cpu")
        self.count = end

    def __del__(self) -> None:
        if self.count:
            self.pool.free(self.pages)


class _Plan(NamedTuple):
    """How a row takes tokens in."""

    own: bool
    """It writes into its own list; else it takes a list of its own."""
    first: int
    """The token with which its first page begins."""
    held: int
    """Pages that it has already, or shares."""
    more: int
    """Pages that it takes."""


@dataclass(frozen=True, eq=False)
class PagedKVCache:
    """The past of several sequences, in pages of a pool. Made by `init_state(batch_size, capacity, pool=...)`.

    A value, as `KVCache` is, with the same methods; sequences of one batch may differ in length (`join`). The shorter
    ones stand at the end, behind places that nobody sees.
    """

    pool: PagePool
    rows: tuple[Row, ...]
    limit: int
    """Most tokens it may hold, where it forgets none."""
    window: int | None = None
    """Keep only the last `window` tokens, as in `KVCache`; pages behind them go back to the pool."""
    length: int = 0
    """Tokens seen so far, of the longest sequence."""
    pads: tuple[int, ...] = ()
    """Of each sequence, by how many tokens it is shorter."""

    @classmethod
    def empty(cls, pool: PagePool, batch_size: int, limit: int, window: int | None, like: Mapping[str, Tensor]) -> Self:
        """Without tokens yet; `like` has by name what is kept of them: (batch, ..., tokens, width)."""
        pool.lay_out(like)
        return cls(pool, tuple(Row(pool) for _ in range(batch_size)), limit, window, 0, (0,) * batch_size)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The pool's, (pages, ..., page_size, width)."""
        return self.pool.buffers

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens seen so far, of each sequence."""
        return tuple(self.length - pad for pad in self.pads)

    @property
    def ragged(self) -> bool:
        return any(self.pads)

    @property
    def kept(self) -> int:
        """Tokens still held, of the longest sequence."""
        return self.length if self.window is None else min(self.length, self.window)

    @property
    def capacity(self) -> int | None:
        return None if self.window is not None else self.limit

    @property
    def batch_size(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of its pages, each counted once."""
        held = [row.pages for row in self.rows]
        return len(torch.cat(held).unique()) * self.pool.page_nbytes if held else 0

    def append(self, **new: Tensor) -> tuple[dict[str, Tensor], Self]:
        """All tokens held with the new ones behind them (each (..., kept + t, width), copied), and the cache that holds
        them.

        Raises ValueError, with nothing written, if the pool has too few pages or the capacity is exceeded, if names,
        batch, widths, dtype or device differ from the pool's, and if a gradient is wanted: pages are written in place.
        """
        grown = self.write(**new)
        if not self.kept:
            return new, grown
        t = next(iter(new.values())).shape[-2]
        if self.window is None or t <= 1:  # else some of what these tokens see is forgotten already
            return {n: grown.read(n, self.kept + t) for n in new}, grown
        return {n: torch.cat([self.read(n), z], -2) for n, z in new.items()}, grown

    def write(self, **new: Tensor) -> Self:
        """The cache that holds the new tokens too; refuses as `append` does."""
        self._check(new)
        t = next(iter(new.values())).shape[-2]
        if t == 0:
            return self
        plans = self._plans(t)
        free = self.pool.take(sum(plan.more for plan in plans))
        rows = []
        for row, length, plan in zip(self.rows, self.lengths, plans, strict=True):
            pages, free = free[: plan.more], free[plan.more :]
            rows.append(row if plan.own else self._branch(row, length, plan, pages))
            if plan.own:
                row.extend(pages)
            rows[-1].written = length + t
        self._put(rows, t, new)
        return replace(self, rows=tuple(rows), length=self.length + t)

    def needed(self, tokens: int) -> int:
        """How many free pages so many tokens more for every sequence take."""
        return sum(plan.more for plan in self._plans(tokens)) if tokens else 0

    def read(self, name: str, tokens: int | None = None) -> Tensor:
        """(B, ..., tokens, width), the last tokens held, by default all; zeros before shorter sequences."""
        tokens = self.kept if tokens is None else tokens
        return gather(self.pool.buffers[name], *self._where(tokens), tokens)

    def pages(self, tokens: int) -> Pages:
        """Where keys and values of the last tokens lie; with a window, one token more than that is there."""
        return Pages(self.pool.buffers["k"], self.pool.buffers["v"], *self._where(tokens), tokens)

    def fork(self) -> Self:
        """A copy, which shares all pages until one of the two goes on."""
        return replace(self)

    def reorder(self, index: Int[Tensor, " B2"]) -> Self:
        """The cache of batch rows `index` (beam search); rows that are named twice share their pages."""
        check_rows(self, index)
        return self._of([(self.rows[b], self.length - self.pads[b]) for b in index.tolist()])

    def join(self, *others: Self) -> Self:
        """One batch of the sequences of this state and others of the same pool, of whatever lengths.

        Raises ValueError if they are of another pool, capacity or window, or hold no tokens yet.
        """
        for other in others:
            if other.pool is not self.pool:
                refuse(self, "others", "have their pages in another pool", other.pool, "states of one pool")
            if (other.limit, other.window) != (self.limit, self.window):
                got = f"capacity {other.limit}, window {other.window}"
                refuse(self, "others", "differ", got, f"capacity {self.limit}, window {self.window}")
        rows = [pair for s in (self, *others) for pair in zip(s.rows, s.lengths, strict=True)]
        if any(length == 0 for _, length in rows):
            refuse(self, "others", "hold no tokens", [n for _, n in rows], "states that have seen some")
        return self._of(rows)

    def crop(self, length: int) -> Self:
        """Forget all tokens after the first `length`, of shorter sequences as many at the end."""
        least = max(self.pads, default=0)
        whole(self, least, most=self.length, length=length)
        drop = self.length - length
        if drop and self.window is not None and self.length > self.window:
            raise ValueError(
                f"{type(self).__name__}: can't crop by {drop}: tokens before the last {self.window} are forgotten "
                "already; keep the state before the tokens you may take back"
            )
        return replace(self, length=length)

    def _of(self, rows: Sequence[tuple[Row, int]]) -> Self:
        length = max((n for _, n in rows), default=self.length)
        return replace(self, rows=tuple(r for r, _ in rows), length=length, pads=tuple(length - n for _, n in rows))

    def _where(self, tokens: int) -> tuple[list[Tensor], list[int], list[int]]:
        """Of each row its pages, the token in them with which it begins, and how many there are."""
        counts = [min(n, tokens) for n in self.lengths]
        ends = zip(self.rows, self.lengths, counts, strict=True)
        return [row.table for row in self.rows], [n - count - row.first for row, n, count in ends], counts

    def _plans(self, t: int) -> list["_Plan"]:
        """How each row takes t tokens in."""
        size, claimed, plans = self.pool.page_size, set[int](), []
        for row, length in zip(self.rows, self.lengths, strict=True):
            first = row.first
            if self.window is not None:  # one token more than the window: a single new token's query sees it
                first = max(first, (length + t - self.window - 1) // size * size)
            own = row.written == length and first == row.first and id(row) not in claimed
            claimed.add(id(row))
            held = row.count if own else max(0, length - first) // size
            plans.append(_Plan(own, first, held, -(-(length + t - first) // size) - held))
        return plans

    def _branch(self, row: Row, length: int, plan: "_Plan", pages: Sequence[int]) -> Row:
        """A row with the same tokens up to `length`, and pages of its own behind the full ones."""
        size = self.pool.page_size
        at = (plan.first - row.first) // size
        shared = row.pages[at : at + plan.held]
        self.pool.share(shared)
        branch = Row(self.pool, shared, plan.first)
        branch.extend(pages)
        if length > plan.first + plan.held * size:  # the last page is partly filled
            for b in self.pool.buffers.values():
                b[pages[0]] = b[int(row.table[at + plan.held])]
        return branch

    def _put(self, rows: Sequence[Row], t: int, new: Mapping[str, Tensor]) -> None:
        """Write the last t tokens of these rows, as far as they are still to be held."""
        size = self.pool.page_size
        if not rows:
            return
        if t == 1 and len(rows) <= 2:  # cheaper than an index
            for b, row in enumerate(rows):
                page, at = int(row.table[row.count - 1]), (row.written - 1 - row.first) % size
                for name, z in new.items():
                    self.pool.buffers[name][page, ..., at, :] = z[b, ..., 0, :]
            return
        spans = [torch.arange(max(row.first, row.written - t), row.written, device="cpu") for row in rows]
        tables = [row.table[(n - row.first) // size] for row, n in zip(rows, spans, strict=True)]
        sources = [b * t + n - (row.written - t) for b, (row, n) in enumerate(zip(rows, spans, strict=True))]
        for name, z in new.items():
            pages, places, of = (torch.cat(x).to(z.device, torch.long) for x in (tables, spans, sources))
            values = z.movedim(-2, 1).flatten(0, 1)
            self.pool.buffers[name][pages, ..., places % size, :] = values if len(of) == len(values) else values[of]

    def _check(self, new: Mapping[str, Tensor]) -> None:
        example = next(iter(new.values()), None)
        held = {n: b[:1].expand(self.batch_size, *b.shape[1:]) for n, b in self.pool.buffers.items()}
        check_fit(self, new, held)
        assert example is not None
        if self.window is None and self.length + example.shape[-2] > self.limit:
            overflow(self, example.shape[-2], self.length, self.limit)
        if torch.is_grad_enabled() and any(z.requires_grad for z in new.values()):
            refuse(
                self,
                "new tokens",
                "want a gradient, and pages are written in place",
                "requires_grad=True",
                "torch.no_grad(), or the KVCache of init_state without a pool",
            )

    def __deepcopy__(self, memo: Any) -> Self:
        return self.fork()


State = KVCache | PagedKVCache
