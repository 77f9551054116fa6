"""Masks of sequences that hold more than one text: trees, shared prefixes, block diffusion, global tokens anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.checks import refuse
from regard.masks import checks
from regard.masks.algebra import Index, Mask
from regard.masks.patterns import GlobalTokens
from regard.masks.tensors import documents, padding, prefix
from regard.masks.verdict import Tiles, Verdict
from regard.tracing import readable


@dataclass(frozen=True, eq=False, repr=False)
class GlobalPlaces(Mask):
    """i or j is one of places[b]; negative ones are none."""

    places: Int[Tensor, "B P"]

    def _among(self, b: Index, x: Index) -> Bool[Tensor, "..."]:
        places = self.places.to(x.device)
        mine = places[0] if places.shape[0] == 1 else places[b]
        return ((x[..., None] == mine) & (mine >= 0)).any(-1)

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        return self._among(b, i) | self._among(b, j)

    def judge(self, tiles: Tiles) -> Verdict:
        # Where neither every row nor every column is global, the others leave a hole: both answers are exact.
        (some_i, all_i), (some_j, all_j) = self._within(tiles.i_lo, tiles.i_hi), self._within(tiles.j_lo, tiles.j_hi)
        return Verdict.exact(some_i | some_j, all_i | all_j)

    def _within(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Whether some, and all, of low..high are global."""
        places = self.places.sort(-1).values
        first = torch.nn.functional.pad(places.diff(dim=-1) != 0, (1, 0), value=True) & (places >= 0)
        places, first = places[:, None, None, None], first[:, None, None, None]
        count = ((places >= low[..., None]) & (places <= high[..., None]) & first).sum(-1)
        return count > 0, count == high - low + 1

    @property
    def batch(self) -> int:
        return self.places.shape[0]

    def to(self, device: torch.device | str) -> Mask:
        return self if self.places.device == torch.device(device) else GlobalPlaces(self.places.to(device))

    def __repr__(self) -> str:
        return f"global_tokens(<{'x'.join(map(str, self.places.shape))}>)"


def global_tokens(places: int | Sequence[int] | Int[Tensor, " P"] | Int[Tensor, "B P"]) -> Mask:
    """Some tokens see all and are seen by all: the first so many, or those at the given places.

    One row of places serves every batch entry; -1 fills rows that have fewer.
    """
    if isinstance(places, Sequence) and not isinstance(places, str):
        least = [checks.integer("global_tokens: places", place, least=0) for place in places]
        places = torch.tensor(least, dtype=torch.long)
    if not isinstance(places, Tensor):
        return GlobalTokens(checks.integer("global_tokens: n", places))
    checks.tensor("global_tokens: places", places, (1, 2), "integer")
    return GlobalPlaces(places if places.ndim == 2 else places[None])


@dataclass(frozen=True, eq=False, repr=False)
class Tree(Mask):
    """j < prefix[b], or j's node is i's or an ancestor of it; node n stands at prefix[b] + n."""

    parents: Int[Tensor, "B N"]
    prefix: Int[Tensor, " b"]
    ancestors: Bool[Tensor, "B N N"]
    """[b, n, m]: m is n or an ancestor of it."""

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        start = self.prefix.to(j.device)
        start = start[0] if start.shape[0] == 1 else start[b]
        before, N = j < start, self.parents.shape[1]
        if N == 0:
            return before | (i != i)
        n, m = i - start, j - start
        row, column = n.clamp(0, N - 1), m.clamp(0, N - 1)
        table = self.ancestors.to(j.device)
        found = table[0][row, column] if table.shape[0] == 1 else table[b, row, column]
        return before | (found & (row == n) & (column == m))

    def judge(self, tiles: Tiles) -> Verdict:
        start = self.prefix.view(-1, 1, 1, 1)
        end = start + self.parents.shape[1]
        # Parents come before their children, so nothing but the prefix is seen ahead.
        nodes = (tiles.i_hi >= start) & (tiles.i_lo < end) & (tiles.j_lo < end) & (tiles.j_lo <= tiles.i_hi)
        some, full = tiles.j_lo < start + 0 * tiles.i_lo, tiles.j_hi < start + 0 * tiles.i_lo
        return Verdict(some, some | nodes, full, full | ((tiles.i_lo >= start) & (tiles.i_hi < end)))

    @property
    def batch(self) -> int:
        return max(self.parents.shape[0], self.prefix.shape[0])

    def to(self, device: torch.device | str) -> Mask:
        if self.parents.device == self.prefix.device == torch.device(device):
            return self
        return Tree(self.parents.to(device), self.prefix.to(device), self.ancestors.to(device))

    def __repr__(self) -> str:
        parents = "x".join(map(str, self.parents.shape))
        return f"tree(<{parents}>, prefix=<{self.prefix.shape[0]}>)"


def tree(parents: Int[Tensor, " N"] | Int[Tensor, "B N"], *, prefix: int | Int[Tensor, " B"] = 0) -> Mask:
    """A tree of continuations behind a prefix, as speculative decoding checks them at once: nodes see the prefix,
    their ancestors and themselves. Node n stands at position prefix + n.

    `parents` says each node's parent, which comes before it, -1 for none. Tokens of the prefix see all of it; with
    `& causal()` only what came before them.
    """
    checks.tensor("tree: parents", parents, (1, 2), "integer")
    parents = (parents if parents.ndim == 2 else parents[None]).long()
    if isinstance(prefix, Tensor):
        start = checks.tensor("tree: prefix", prefix, (1,), "integer").to(parents.device)
    else:
        start = torch.full((1,), checks.integer("tree: prefix", prefix, least=0), device=parents.device)
    B, N = parents.shape
    if start.shape[0] not in (1, B) and B != 1:
        refuse("tree", "prefix", "has the wrong shape", tuple(start.shape), f"(B = {B},)")
    node = torch.arange(N, device=parents.device)
    if readable(parents):
        wrong = (parents >= node) | (parents < -1)
        if bool(wrong.any()):
            b, n = wrong.nonzero()[0].tolist()
            words = "an earlier node, or -1"
            refuse("tree", "parents", "must come before their children", f"{int(parents[b, n])} of node {n}", words)
    ancestors = (parents[..., None] == node) | (node[:, None] == node)
    for _ in range(max(N - 1, 1).bit_length()):  # each time paths of twice the length
        ancestors = (ancestors.float() @ ancestors.float()) > 0
    return Tree(parents, start, ancestors)


def shared_prefix(n: int | Int[Tensor, " B"], lengths: Sequence[int] | Int[Tensor, " K"] | Int[Tensor, "B K"]) -> Mask:
    """Several continuations of one prefix, end to end behind it: tokens see the first n keys and their own
    continuation, `lengths[k]` tokens long. Tokens of the prefix see the prefix. Add `& causal()` for text.
    """
    if isinstance(lengths, Sequence) and not isinstance(lengths, str):
        lengths = torch.tensor([checks.integer("shared_prefix: lengths", m, least=0) for m in lengths])
    checks.tensor("shared_prefix: lengths", lengths, (1, 2), "integer")
    lengths = lengths if lengths.ndim == 2 else lengths[None]
    if isinstance(n, Tensor):
        start = checks.tensor("shared_prefix: n", n, (1,), "integer").to(lengths.device)[:, None]
    else:
        start = torch.full((1, 1), checks.integer("shared_prefix: n", n), device=lengths.device)
    if start.shape[0] != lengths.shape[0] and 1 not in (start.shape[0], lengths.shape[0]):
        refuse("shared_prefix", "n", "has the wrong shape", (start.shape[0],), f"(B = {lengths.shape[0]},)")
    if bool((lengths < 0).any()):
        refuse("shared_prefix", "lengths", "is out of range", int(lengths.min()), "numbers >= 0")
    ends = start + torch.nn.functional.pad(lengths.cumsum(-1), (1, 0))
    place = torch.arange(int(ends.max()), device=ends.device)
    own = documents((place >= ends[..., None]).sum(1))
    both = own | (prefix(start[:, 0]) if isinstance(n, Tensor) else prefix(n))
    return both if ends.shape[0] == 1 else both & padding(lengths=ends[:, -1])


@dataclass(frozen=True, repr=False)
class BlockCausal(Mask):
    """j // size <= i // size."""

    size: int

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        return j // self.size <= i // self.size

    def judge(self, tiles: Tiles) -> Verdict:
        some = tiles.j_lo // self.size <= tiles.i_hi // self.size
        return Verdict.exact(some, tiles.j_hi // self.size <= tiles.i_lo // self.size)

    @property
    def span(self) -> tuple[int | float, int | float]:
        return float("inf"), self.size - 1

    def __repr__(self) -> str:
        return f"block_causal({self.size})"


def block_causal(size: int) -> Mask:
    """j // size <= i // size: blocks see themselves in both directions and all earlier ones. Block diffusion
    (arXiv 2503.09573) generates under it."""
    return BlockCausal(checks.integer("block_causal: size", size))


@dataclass(frozen=True, repr=False)
class BlockDiffusion(Mask):
    """Of 2 length tokens the first half is noised, the second clean. With blocks counted in each half:
    noised see their own noised block and earlier clean ones; clean see clean blocks up to their own."""

    size: int
    length: int

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        n = self.length
        clean_i, clean_j = i >= n, j >= n
        mine, theirs = (i - n * clean_i) // self.size, (j - n * clean_j) // self.size
        own = (mine == theirs) & (clean_i == clean_j)
        return (own | ((theirs < mine) & clean_j)) & (i >= 0) & (i < 2 * n) & (j < 2 * n)

    def judge(self, tiles: Tiles) -> Verdict:
        no = torch.zeros_like(tiles.i_lo + tiles.j_lo, dtype=torch.bool)
        some, full = no, ~no & (tiles.i_lo >= 0) & (tiles.i_hi < 2 * self.length) & (tiles.j_hi < 2 * self.length)
        for clean_i in (False, True):
            first_i, last_i, any_i = self._blocks(tiles.i_lo, tiles.i_hi, clean_i)
            for clean_j in (False, True):
                first_j, last_j, any_j = self._blocks(tiles.j_lo, tiles.j_hi, clean_j)
                there = any_i & any_j
                if not clean_j:  # noised keys: for noised queries of the same block
                    meet = (first_i <= last_j) & (first_j <= last_i) & (not clean_i)
                    all_ = meet & (first_i == last_i) & (first_j == last_j) & (first_i == first_j)
                elif clean_i:
                    meet, all_ = first_j <= last_i, last_j <= first_i
                else:
                    meet, all_ = first_j < last_i, last_j < first_i
                some, full = some | (there & meet), full & (~there | all_)
        return Verdict.exact(some, full)

    def _blocks(self, low: Tensor, high: Tensor, clean: bool) -> tuple[Tensor, Tensor, Tensor]:
        """First and last block of that half which low..high touches, and whether it touches any."""
        start = self.length * clean
        first, last = low.clamp(min=start) - start, high.clamp(max=start + self.length - 1) - start
        return first // self.size, last // self.size, first <= last

    def __repr__(self) -> str:
        return f"block_diffusion({self.size}, {self.length})"


def block_diffusion(size: int, length: int) -> Mask:
    """The mask that block diffusion (arXiv 2503.09573) trains under, over `length` noised tokens and then the same ones
    clean. Noised blocks see themselves in both directions and the clean copies of all earlier blocks; clean blocks
    see clean ones up to and with their own. It generates under `block_causal(size)`.
    """
    size = checks.integer("block_diffusion: size", size)
    return BlockDiffusion(size, checks.integer("block_diffusion: length", length))
