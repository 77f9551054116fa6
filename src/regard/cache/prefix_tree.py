"""A cache of keys and values for many sequences, in which a prefix that several of them share is stored once.

Chunks of c tokens stand in one pool. A sequence is a path of chunks and a length; sequences that begin alike walk the
same chunks, so the paths form a tree. Chunks are written behind what is there and never changed: a fork shares even
the last, half-filled chunk, and whoever writes there second copies it first. A chunk that no path needs goes back to
the pool.

Attention of one new query per sequence is exact, and reads what is shared once: `regard.kernels.two_phase`.
"""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from regard.checks import choice, divides, fits, refuse, whole
from regard.kernels.two_phase import Shares, two_phase

if TYPE_CHECKING:
    from regard.kernels.triton_decode import Pieces


@dataclass(eq=False)
class _Chunk:
    """One chunk of the pool."""

    uid: int
    slot: int
    written: int = 0
    tokens: list[Hashable] | None = field(default_factory=list)
    """Their names; None once any is unknown."""
    paths: int = 0
    """How many paths go through it."""
    known_as: tuple[int, tuple[Hashable, ...]] | None = None
    """Its key among the chunks that later sequences may share."""


@dataclass(eq=False)
class _Path:
    """Chunks one after another, all but the last full. Forks share it: what differs is their length."""

    chunks: tuple[_Chunk, ...]
    sequences: int = 1


class _Plan(NamedTuple):
    """How the sequences asked for lie in the pool; good for as long as their paths are the same objects."""

    paths: list[_Path]
    shared: list[tuple[Tensor, list[slice]]]
    """Rows, and the stretches of the pool that they share."""
    own: list[list[slice]]
    """The stretches of each row's own chunks; the last may be used in part."""
    before: list[int]
    """How many tokens of a row are shared."""


class PrefixTree:
    """Keys and values of many sequences; shared prefixes once.

    Args:
        num_kv_heads, head_dim, value_dim: G, D and V (default D).
        chunk: c, tokens in a chunk. Only whole chunks are found to be alike.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        chunk: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        whole(self, num_kv_heads=num_kv_heads, head_dim=head_dim, chunk=chunk)
        self.chunk = chunk
        self.k = torch.zeros(num_kv_heads, 0, head_dim, device=device, dtype=dtype)
        self.v = torch.zeros(num_kv_heads, 0, head_dim if value_dim is None else value_dim, device=device, dtype=dtype)
        self._free = bytearray()  # a 1 for every unused slot
        self._known: dict[tuple[int, tuple[Hashable, ...]], _Chunk] = {}
        self._sequences: dict[int, _Path] = {}
        self._lengths: dict[int, int] = {}
        self._ids, self._uids = 0, 0
        self._last_plan: _Plan | None = None
        self._last_pieces: tuple[_Plan, int, "Pieces"] | None = None

    # --- what is held -------------------------------------------------------------------------------------------

    @property
    def chunks_in_use(self) -> int:
        return self._free.count(0)

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks in use."""
        tokens, (G, _, D), V = self.chunks_in_use * self.chunk, self.k.shape, self.v.shape[2]
        return tokens * G * (D + V) * self.k.element_size()

    def length(self, sequence: int) -> int:
        """Tokens of this sequence."""
        return self._lengths[self._check(sequence)]

    def held(self, tokens: Sequence[Hashable]) -> int:
        """How many of the first of these tokens are stored already, in whole chunks: no need to compute their keys."""
        at, parent = 0, -1
        while chunk := self._known.get((parent, tuple(tokens[at : at + self.chunk]))):
            at, parent = at + self.chunk, chunk.uid
        return at

    def keys(self, sequence: int) -> tuple[Float[Tensor, "G S D"], Float[Tensor, "G S V"]]:
        """All keys and values of one sequence, in order (a copy)."""
        stretches = _first(self._stretches(self._sequences[self._check(sequence)].chunks), self._lengths[sequence])
        k, v = (torch.cat([z[:, at] for at in (slice(0, 0), *stretches)], 1) for z in (self.k, self.v))
        return k, v

    # --- sequences come, grow, branch and go --------------------------------------------------------------------

    def add(
        self,
        k: Float[Tensor, "G S D"] | None = None,
        v: Float[Tensor, "G S V"] | None = None,
        *,
        tokens: Sequence[Hashable] | None = None,
    ) -> int:
        """A new sequence, and its number. Without tokens it can share with its own forks only.

        Args:
            k, v: of all tokens, or of the last ones where `held` says that the others are stored.
            tokens: what they are called (ids). Chunks of equal tokens after an equal past are taken to have equal keys
                and values: the first ones stored serve all.
        """
        sequence, self._ids = self._ids, self._ids + 1
        self._sequences[sequence], self._lengths[sequence] = _Path(()), 0
        if k is not None and v is not None:
            stored = 0 if tokens is None else len(tokens) - k.shape[1]
            try:
                if tokens is not None and not 0 <= stored <= self.held(tokens):
                    got = f"keys of {k.shape[1]} of {len(tokens)} tokens"
                    wanted = f"all that are not stored, as {self.held(tokens)} are"
                    refuse(self, "k", "leaves tokens out, or has too many", got, wanted)
                self._grow([sequence], k[None], v[None], None if tokens is None else [tokens], stored)
            except ValueError:
                self.free(sequence)
                raise
        return sequence

    def append(
        self,
        sequences: Sequence[int],
        k: Float[Tensor, "N G t D"],
        v: Float[Tensor, "N G t V"],
        *,
        tokens: Sequence[Sequence[Hashable]] | None = None,
    ) -> None:
        """t more tokens to each of these sequences."""
        if len(set(sequences)) != len(sequences):
            refuse(self, "sequences", "names one twice", list(sequences), "each once a call")
        self._grow([self._check(s) for s in sequences], k, v, tokens, 0)

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens, at no cost until the two part."""
        path, length = self._sequences[self._check(sequence)], self._lengths[sequence]
        path.sequences += 1
        twin, self._ids = self._ids, self._ids + 1
        self._sequences[twin], self._lengths[twin] = path, length
        return twin

    def free(self, sequence: int) -> None:
        """Forget a sequence; chunks that no other needs go back to the pool."""
        path = self._sequences.pop(self._check(sequence))
        del self._lengths[sequence]
        self._leave(path)

    # --- attention ----------------------------------------------------------------------------------------------

    def attend(
        self,
        q: Float[Tensor, "N H D"],
        sequences: Sequence[int],
        *,
        scale: float | None = None,
        kernel: Literal["torch", "triton"] = "torch",
    ) -> Float[Tensor, "N H V"]:
        """softmax(q k^T scale) v over all tokens of each query's sequence; scale is 1 / sqrt(D) by default.

        Args:
            kernel: "triton" runs the kernels of `triton_decode`, on a CUDA device or in Triton's interpreter.
        """
        choice(self, ("torch", "triton"), kernel=kernel)
        G, _, D = self.k.shape
        fits(self, "N H D", {"N": len(sequences), "D": D}, q=q)
        divides(self, num_kv_heads=G, heads_of_q=q.shape[1])
        plan = self._plan([self._sequences[self._check(s)] for s in sequences])
        H = q.shape[1]
        scale = D**-0.5 if scale is None else scale
        if kernel == "triton":
            lengths = torch.tensor([self._lengths[s] for s in sequences], dtype=torch.int32, device=q.device)
            from regard.kernels.triton_decode import triton_decode

            return triton_decode(q, self.k, self.v, self._pieces(plan, H // G), lengths, scale=scale)
        left = (self._lengths[s] - before for s, before in zip(sequences, plan.before, strict=True))
        own = [_first(stretches, length) for stretches, length in zip(plan.own, left, strict=True)]
        return two_phase(q, self.k, self.v, Shares(plan.shared, own), scale=scale)

    # --- inside -------------------------------------------------------------------------------------------------

    def _check(self, sequence: int) -> int:
        if sequence not in self._sequences:
            refuse(self, "sequence", "is unknown", repr(sequence), "one that was added and not freed")
        return sequence

    def _grow(
        self,
        sequences: Sequence[int],
        k: Tensor,
        v: Tensor,
        tokens: Sequence[Sequence[Hashable]] | None,
        stored: int,
    ) -> None:
        """Find places for all tokens, then write them at once. The first `stored` tokens are in the tree already."""
        t = k.shape[2] if k.dim() == 4 else -1
        for name, new, pool in (("k", k, self.k), ("v", v, self.v)):
            want = (len(sequences), pool.shape[0], t, pool.shape[2])
            if tuple(new.shape) != want or new.dtype != pool.dtype or new.device != pool.device:
                got = f"{new.dtype} {tuple(new.shape)} on {new.device}"
                wanted = f"{pool.dtype} {want} on {pool.device} (with a sequence dimension)"
                refuse(self, name, "does not fit the pool", got, wanted)
        if tokens is not None and [len(one) for one in tokens] != [t + stored] * len(sequences):
            got = f"{[len(one) for one in tokens]} names"
            refuse(self, "tokens", "don't fit", got, f"{t + stored} for each of {len(sequences)} sequences")
        places: list[int] = []
        source: list[int] = []
        for row, sequence in enumerate(sequences):
            done = 0
            while done < t + stored:
                names = None if tokens is None else tokens[row]
                chunk, fill, count = self._room(sequence, names, done, t + stored - done)
                if chunk is not None:
                    places += range(chunk.slot * self.chunk + fill, chunk.slot * self.chunk + fill + count)
                    source += range(row * t + done - stored, row * t + done - stored + count)
                done += count
        if places:
            at, of = (torch.tensor(index, device=k.device) for index in (places, source))
            self._write(at, *(z.transpose(0, 1).flatten(1, 2)[:, of] for z in (k, v)))

    def _room(
        self, sequence: int, names: Sequence[Hashable] | None, done: int, left: int
    ) -> tuple[_Chunk | None, int, int]:
        """Take the next tokens in: the chunk to write to (None: they are there already), from where, and how many."""
        path, c = self._sequences[sequence], self.chunk
        fill = self._lengths[sequence] - (len(path.chunks) - 1) * c if path.chunks else c
        if fill == c:
            parent = path.chunks[-1].uid if path.chunks else -1
            fill, count = 0, min(c, left)
            here = None if names is None or count < c else self._known.get((parent, tuple(names[done : done + c])))
            if here is not None:
                self._walk(sequence, (*path.chunks, here))
                self._lengths[sequence] += c
                return None, 0, c
            chunk = self._take(path.chunks[-1].slot if path.chunks else None, -(-left // c))
            self._walk(sequence, (*path.chunks, chunk))
        else:
            chunk, count = path.chunks[-1], min(c - fill, left)
            if chunk.written != fill:  # a fork has gone on from here
                chunk = self._copy(chunk, fill)
                self._walk(sequence, (*path.chunks[:-1], chunk))
        chunk.written = fill + count
        if names is None:
            chunk.tokens = None
        elif chunk.tokens is not None:
            chunk.tokens += names[done : done + count]
        self._lengths[sequence] += count
        if chunk.written == c and chunk.tokens is not None:
            before = self._sequences[sequence].chunks[:-1]
            key = (before[-1].uid if before else -1, tuple(chunk.tokens))
            if key not in self._known:
                self._known[key], chunk.known_as = chunk, key
        return chunk, fill, count

    def _walk(self, sequence: int, chunks: tuple[_Chunk, ...]) -> None:
        """Give the sequence a path of its own."""
        for chunk in chunks:
            chunk.paths += 1
        old, self._sequences[sequence] = self._sequences[sequence], _Path(chunks)
        self._leave(old)

    def _leave(self, path: _Path) -> None:
        path.sequences -= 1
        if path.sequences:
            return
        for chunk in path.chunks:
            chunk.paths -= 1
            if chunk.paths == 0:
                self._free[chunk.slot] = 1
                if chunk.known_as is not None:
                    del self._known[chunk.known_as]
        if self._last_plan is not None and path in self._last_plan.paths:
            self._last_plan = self._last_pieces = None

    def _take(self, after: int | None, wanted: int = 1) -> _Chunk:
        """An unused chunk: behind slot `after` if that is free, so that a sequence lies in few stretches; else in the
        middle of the largest gap, so that there is room to go on. `wanted` is how many will follow at once.
        """
        free = self._free
        slot = -1 if after is None else after + 1
        if not (0 <= slot < len(free) and free[slot]):
            gaps = [(len(gap.group()), gap.start()) for gap in re.finditer(b"\x01+", free)]
            if not gaps:
                more = max(4, wanted, len(free))
                gaps = [(more, len(free))]
                free.extend(b"\x01" * more)
                tokens = more * self.chunk
                self.k, self.v = (
                    torch.cat([z, z.new_zeros(z.shape[0], tokens, z.shape[2])], 1) for z in (self.k, self.v)
                )
            room, slot = max(gaps)
            slot += max(0, room - wanted) // 2
        free[slot] = 0
        self._uids += 1
        return _Chunk(self._uids, slot)

    def _copy(self, chunk: _Chunk, fill: int) -> _Chunk:
        """A chunk with the first `fill` tokens of another."""
        twin = self._take(None)
        twin.tokens = None if chunk.tokens is None else chunk.tokens[:fill]
        at, of = twin.slot * self.chunk, slice(chunk.slot * self.chunk, chunk.slot * self.chunk + fill)
        self._write(torch.arange(at, at + fill, device=self.k.device), *(z[:, of].clone() for z in (self.k, self.v)))
        return twin

    def _write(self, places: Tensor, k: Float[Tensor, "G n D"], v: Float[Tensor, "G n V"]) -> None:
        graph = torch.is_grad_enabled() and any(z.requires_grad for z in (k, v, self.k, self.v))
        asked = not torch.compiler.is_compiling()  # which can't ask
        if graph or (asked and self.k.is_inference() and not torch.is_inference_mode_enabled()):
            self.k, self.v = (
                self.k.index_copy(1, places, k),
                self.v.index_copy(1, places, v),
            )  # a graph may hold the old; those made under inference_mode nobody may write to outside of it
        else:
            self.k.index_copy_(1, places, k)
            self.v.index_copy_(1, places, v)

    def _stretches(self, chunks: Sequence[_Chunk]) -> list[slice]:
        """Where they lie in the pool, neighbours as one."""
        found: list[slice] = []
        for chunk in chunks:
            start, stop = chunk.slot * self.chunk, (chunk.slot + 1) * self.chunk
            if found and found[-1].stop == start:
                start = found.pop().start
            found.append(slice(start, stop))
        return found

    def _plan(self, paths: list[_Path]) -> _Plan:
        last = self._last_plan
        if last is not None and len(last.paths) == len(paths) and all(a is b for a, b in zip(last.paths, paths)):
            return last
        rows: dict[_Chunk, list[int]] = {}
        for row, path in enumerate(paths):
            for chunk in path.chunks[:-1]:  # the last may be longer for others
                rows.setdefault(chunk, []).append(row)
        runs: dict[tuple[int, ...], list[_Chunk]] = {}
        for chunk, of in rows.items():
            if len(of) > 1:
                runs.setdefault(tuple(of), []).append(chunk)
        shared = [(torch.tensor(of, device=self.k.device), self._stretches(chunks)) for of, chunks in runs.items()]
        alone = [[*(c for c in path.chunks[:-1] if len(rows[c]) < 2), *path.chunks[-1:]] for path in paths]
        before = [(len(path.chunks) - len(chunks)) * self.chunk for path, chunks in zip(paths, alone, strict=True)]
        self._last_plan = _Plan(paths, shared, [self._stretches(chunks) for chunks in alone], before)
        return self._last_plan

    def _pieces(self, plan: _Plan, heads: int) -> "Pieces":
        """The plan as the kernels want it, for so many query heads to a key head."""
        last = self._last_pieces
        if last is None or last[0] is not plan or last[1] != heads:
            from regard.kernels.triton_decode import pieces, rows_at_once

            shared = [(rows.tolist(), stretches) for rows, stretches in plan.shared]
            cut = pieces(shared, plan.own, plan.before, rows_at_once=rows_at_once(heads), device=self.k.device)
            last = self._last_pieces = plan, heads, cut
        return last[2]


def _first(stretches: list[slice], tokens: int) -> list[slice]:
    """The part of them that holds the first so many tokens."""
    used = []
    for at in stretches:
        count = min(tokens, at.stop - at.start)
        if count:
            used.append(slice(at.start, at.start + count))
        tokens -= count
    return used
