"""The built-in masks that hold tensors: each equals only itself, and allows nothing outside its tensor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard import rules
from regard.checks import refuse
from regard.masks import checks
from regard.masks.algebra import And, Index, Joined, Mask
from regard.masks.patterns import Prefix
from regard.masks.stamp import made_of
from regard.masks.verdict import Tiles, Verdict, corners, counted


def _never(index: Index) -> Bool[Tensor, "..."]:
    """False in the index's own shape, device and tracing context."""
    return index != index


def _look_up(table: Tensor, b: Index, position: Index) -> tuple[Tensor, Tensor]:
    """table[b, position], and whether the position lies inside the table at all."""
    width = table.shape[1]
    if width == 0:
        return position, _never(position)
    table, safe = table.to(position.device), position.clamp(0, width - 1)
    return table[0][safe] if table.shape[0] == 1 else table[b, safe], safe == position


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Mask):
    """ids[b, i] == ids[b, j]."""

    ids: Int[Tensor, "B S"]

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        (mine, inside_i), (theirs, inside_j) = _look_up(self.ids, b, i), _look_up(self.ids, b, j)
        return (mine == theirs) & inside_i & inside_j

    def judge(self, tiles: Tiles) -> Verdict:
        width = self.ids.shape[1]
        if width == 0:
            never = _never(tiles.i_lo + tiles.j_lo)
            return Verdict.exact(never, never)
        i_lo, i_hi, j_lo, j_hi = (x.clamp(0, width - 1) for x in vars(tiles).values())
        (min_i, max_i), (min_j, max_j) = self._extremes(i_lo, i_hi), self._extremes(j_lo, j_hi)
        touches = (tiles.i_hi >= 0) & (tiles.i_lo < width) & (tiles.j_hi >= 0) & (tiles.j_lo < width)
        inside = (tiles.i_lo >= 0) & (tiles.i_hi < width) & (tiles.j_lo >= 0) & (tiles.j_hi < width)
        may = touches & (min_i <= max_j) & (min_j <= max_i)
        same = touches & (min_i == max_j) & (max_i == min_j)
        # Ranges of sorted ids (packed documents) only overlap if they share one; else only i = j is sure.
        meets = touches & (torch.maximum(i_lo, j_lo) <= torch.minimum(i_hi, j_hi))
        return Verdict(may if self._sorted else same | meets, may, same & inside, same & inside)

    @made_of("ids")
    def _sorted(self) -> bool:
        return bool((self.ids.diff(dim=1) >= 0).all())

    def _extremes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest id in low..high, shaped (B, 1, *rows, columns of low)."""
        shape = (-1, 1, *low.shape[-2:])
        if self._sorted:
            return self.ids[:, low.flatten()].view(shape), self.ids[:, high.flatten()].view(shape)
        offsets = torch.arange(int((high - low).max()) + 1, device=low.device)
        ids = self.ids[:, torch.minimum(low.flatten()[:, None] + offsets, high.flatten()[:, None])]
        return ids.amin(-1).view(shape), ids.amax(-1).view(shape)

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> Self:
        return self if self.ids.device == torch.device(device) else replace(self, ids=self.ids.to(device))

    def __repr__(self) -> str:
        return f"documents(<{'x'.join(map(str, self.ids.shape))}>)"


@dataclass(frozen=True, eq=False, repr=False)
class Packed(Documents):
    """Documents that lie end to end from the first token on; what stands behind the last one is in none."""

    lengths: tuple[tuple[int, ...], ...]
    """Of the documents of each row, as plain numbers: layers that run documents apart need no look at the device."""

    @property
    def positions(self) -> Int[Tensor, "*b S"]:
        """Where each token stands in its own document, as transformers' `position_ids` say it: 0, 1, 2, 0, 1, ..."""
        return self.positions_of(self.ids.shape[1])

    def positions_of(self, T: int) -> Int[Tensor, "*b T"]:
        """`positions` of T tokens; those in no document count as one more."""
        places = self.places(T)
        return places[0] if self.batch == 1 else places

    def places(self, T: int) -> Int[Tensor, "#B T"]:
        """`positions_of` with an axis for rows; 0 is where a scan forgets what came before."""
        ids = torch.nn.functional.pad(self.ids, (0, T - self.ids.shape[1]), value=max(map(len, self.lengths)))
        at = torch.arange(T, device=ids.device)
        first = torch.nn.functional.pad(ids.diff(dim=1) != 0, (1, 0), value=True)[:, :T]
        return at - torch.where(first, at, 0).cummax(1).values

    def real(self, B: int, T: int, keep: Bool[Tensor, "B T"] | None = None) -> Bool[Tensor, "B T"]:
        """Which of T tokens are in a document, of those that are kept."""
        ends = torch.tensor([sum(row) for row in self.lengths], device=self.ids.device)
        inside = (torch.arange(T, device=self.ids.device) < ends[:, None]).expand(B, -1)
        return inside if keep is None else inside & keep

    def fits(self, who: object, S: int) -> None:
        """Refuse documents that need more than S tokens."""
        if self.ids.shape[1] > S:
            got = f"{self.ids.shape[1]} tokens of documents and {S} of the input"
            refuse(who, "cu_seqlens", "end behind the last token", got, f"cu_seqlens[-1] <= {S}")

    def __repr__(self) -> str:
        return f"packed({', '.join(f'<{len(row)}>' for row in self.lengths)})"

    @classmethod
    def of(cls, cu_seqlens: Int[Tensor, "B P"]) -> "Packed":
        """From `cu_seqlens` as the property gives them."""
        rows = tuple(tuple(row) for row in cu_seqlens.diff(dim=1).tolist())
        width = max(map(sum, rows))
        counts = torch.nn.functional.pad(cu_seqlens, (0, 1), value=width).long().diff(dim=1)
        number = torch.arange(counts.shape[1], device=counts.device)
        return cls(torch.stack([number.repeat_interleave(row, output_size=width) for row in counts]), rows)

    @property
    def cu_seqlens(self) -> Int[Tensor, "B P"]:
        """The cumulative lengths, a row each; shorter ones have empty documents at the end."""
        widest = max(map(len, self.lengths))
        sizes = [[0, *row, *(0,) * (widest - len(row))] for row in self.lengths]
        return torch.tensor(sizes, device=self.ids.device).cumsum(1, dtype=torch.int32)


def documents(ids: Int[Tensor, " S"] | Int[Tensor, "B S"]) -> Mask:
    """ids[i] == ids[j]: tokens see only their own document. One row of ids serves every batch entry."""
    checks.tensor("documents: ids", ids, (1, 2), "integer")
    return Documents(ids if ids.ndim == 2 else ids[None])


def packed(cu_seqlens: Int[Tensor, " P"] | Sequence[Int[Tensor, " P"]]) -> Mask:
    """Documents that lie end to end, given by their cumulative lengths (0, len_0, len_0 + len_1, ...), as flash-attn
    takes them. Every token sees the tokens of its own document, what stands behind the last one sees nothing.

    Its `positions` start again at 0 with each document. `regard.Attention` uses them where it is told no others, and
    layers that keep a state start it anew: a packed row gives what its documents give one by one.

    Args:
        cu_seqlens: of one row, which serves every batch entry, or one such tensor for each.
    """
    rows = list(cu_seqlens) if isinstance(cu_seqlens, Sequence) else [cu_seqlens]
    if not rows:
        raise ValueError("packed: expected at least one cu_seqlens (got none)")
    ends = [checks.cumulative("packed: cu_seqlens", row)[-1] for row in rows]
    widest = max(map(len, rows))
    filled = [torch.cat([row, row[-1:].expand(widest - len(row))]) for row in rows]  # with empty documents
    mask = Packed.of(torch.stack(filled))
    return mask & padding(lengths=torch.tensor(ends, device=mask.ids.device)) if len(set(ends)) > 1 else mask


def unpacked(mask: Mask | Tensor | None) -> tuple[Packed | None, list[Mask | Tensor]]:
    """The packed documents that a mask keeps apart, itself or a part of `&`, and what it says besides."""
    parts: list[Any] = list(mask.parts) if isinstance(mask, And) else [] if mask is None else [mask]
    held = [part for part in parts if isinstance(part, Packed)]
    if len(held) > 1:
        raise ValueError(f"mask: documents are packed twice (got {mask!r}); expected one masks.packed")
    return (held[0] if held else None), [part for part in parts if not isinstance(part, Packed)]


@dataclass(frozen=True, eq=False, repr=False)
class Kept(Mask):
    """keep[b, j]."""

    keep: Bool[Tensor, "B S"]

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        keep, inside = _look_up(self.keep, b, j)
        return keep.bool() & inside

    def judge(self, tiles: Tiles) -> Verdict:
        width = self.keep.shape[1]
        low, end = tiles.j_lo.flatten(), tiles.j_hi.flatten() + 1
        kept = self._before[:, end.clamp(0, width)] - self._before[:, low.clamp(0, width)]
        shape = (-1, 1, *tiles.j_lo.shape[-2:])
        return Verdict.exact((kept > 0).view(shape), (kept == end - low).view(shape))

    @made_of("keep")
    def _before(self) -> Int[Tensor, "B P"]:
        """How many keys before each one are kept."""
        return torch.nn.functional.pad(self.keep.cumsum(1, dtype=torch.int32), (1, 0))

    @property
    def batch(self) -> int:
        return self.keep.shape[0]

    def to(self, device: torch.device | str) -> Mask:
        return self if self.keep.device == torch.device(device) else Kept(self.keep.to(device))

    def __repr__(self) -> str:
        return f"padding(<{'x'.join(map(str, self.keep.shape))}>)"


@dataclass(frozen=True, eq=False, repr=False)
class Lengths(Mask):
    """j < n[b]."""

    n: Int[Tensor, " B"]
    words: str

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        n = self.n.to(j.device)
        return j < (n[0] if n.shape[0] == 1 else n[b])

    def judge(self, tiles: Tiles) -> Verdict:
        n = self.n.view(-1, 1, 1, 1)
        return Verdict.exact(tiles.j_lo < n, tiles.j_hi < n)

    @property
    def batch(self) -> int:
        return self.n.shape[0]

    def to(self, device: torch.device | str) -> Mask:
        return self if self.n.device == torch.device(device) else replace(self, n=self.n.to(device))

    def __repr__(self) -> str:
        return self.words.format(f"<{self.n.shape[0]}>")


def prefix(n: int | Int[Tensor, " B"]) -> Mask:
    """j < n: the first n keys, one number for all or one for each batch entry."""
    if isinstance(n, Tensor):
        return Lengths(checks.tensor("prefix: n", n, (1,), "integer"), "prefix({})")
    return Prefix(checks.integer("prefix: n", n))


def padding(keep: Bool[Tensor, "B S"] | None = None, *, lengths: Int[Tensor, " B"] | None = None) -> Mask:
    """Hides keys: `keep` says which may be seen, or `lengths` that the first so many of each entry may."""
    if (keep is None) == (lengths is None):
        raise ValueError("padding: give either keep or lengths (got both or neither)")
    if lengths is not None:
        return Lengths(checks.tensor("padding: lengths", lengths, (1,), "integer"), "padding(lengths={})")
    return Kept(checks.tensor("padding: keep", keep, (2,), "bool"))


CORNERS = 2**22
"""Entries of a tensor mask, at most, for which four bytes each are kept."""


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Mask):
    """A ready-made tensor, bottom-right aligned: its rows are the last T of its S positions."""

    tensor: Bool[Tensor, "B H T S"]

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        B, H, T, S = self.tensor.shape
        if T == 0 or S == 0:
            return _never(i + j)
        t = i - (S - T)
        row, column = t.clamp(0, T - 1), j.clamp(0, S - 1)
        index = row * S + column
        if H > 1:
            index = h * (T * S) + index
        if B > 1:
            index = b * (H * T * S) + index
        return self.tensor.to(j.device).reshape(-1)[index] & (row == t) & (column == j)

    def judge(self, tiles: Tiles) -> Verdict:
        before = self._before
        return Verdict.unknown(tiles) if before is None else counted(before, tiles, *self.tensor.shape[2:])

    @made_of("tensor")
    def _before(self) -> Tensor | None:
        """Its `corners`, as long as they are few: looking at every entry of a tile takes ten times as long."""
        return corners(self.tensor) if 0 < self.tensor.numel() <= CORNERS else None

    @property
    def batch(self) -> int:
        return self.tensor.shape[0]

    @property
    def heads(self) -> int:
        return self.tensor.shape[1]

    def to(self, device: torch.device | str) -> Mask:
        return self if self.tensor.device == torch.device(device) else Dense(self.tensor.to(device))

    def __repr__(self) -> str:
        return f"dense(<{'x'.join(map(str, self.tensor.shape))}>)"


def dense(tensor: Bool[Tensor, "T S"] | Bool[Tensor, "#B #H T S"]) -> Mask:
    """A bool tensor as a mask, so that it can be combined. True = may attend."""
    checks.tensor("dense: tensor", tensor, (2, 4), "bool")
    return Dense(tensor if tensor.ndim == 4 else tensor[None, None])


class PerHead(Joined):
    """Head n follows parts[n]."""

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        allowed = self.parts[0](b, h, i, j)
        for n, part in enumerate(self.parts[1:], start=1):
            allowed = torch.where(h == n, part(b, h, i, j), allowed)
        return allowed

    def judge(self, tiles: Tiles) -> Verdict:
        verdicts = [part.judge(tiles) for part in self.parts]
        shape = torch.broadcast_shapes(*(v.may.shape for v in verdicts))
        fields = ("some", "may", "full", "may_full")
        return Verdict(*(torch.cat([getattr(v, f).broadcast_to(shape) for v in verdicts], 1) for f in fields))

    @property
    def heads(self) -> int:
        return len(self.parts)

    @property
    def is_shift_invariant(self) -> bool:
        return False

    @property
    def span(self) -> tuple[int | float, int | float]:
        return max(part.span[0] for part in self.parts), max(part.span[1] for part in self.parts)

    def __repr__(self) -> str:
        return f"per_head([{', '.join(map(repr, self.parts))}])"


def per_head(masks: Sequence[Mask]) -> Mask:
    """A mask of its own for each head."""
    for n, mask in enumerate(masks):
        if not isinstance(mask, Mask):
            raise TypeError(f"per_head: every entry must be a Mask (got {type(mask).__name__} at {n})")
        if mask.heads != 1:
            raise ValueError(f"per_head: entries must not differ by head themselves (got {mask!r} at {n})")
    if len(masks) == 0:
        raise ValueError("per_head: expected at least one mask (got none)")
    return PerHead(tuple(masks))


@dataclass(frozen=True, repr=False)
class Predicate(Mask):
    """Any function of (b, h, i - shift, j)."""

    asks = True

    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    sizes: tuple[int, int] = (1, 1)
    shift: int = 0

    @property
    def batch(self) -> int:
        return self.sizes[0]

    @property
    def heads(self) -> int:
        return self.sizes[1]

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        return rules.entries("predicate", self.function, b, h, i - self.shift if self.shift else i, j)

    def reads(self) -> list[Tensor] | None:
        """The tensors that the function reads of its own; None where they can't be told."""
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device="cpu")
        return rules.reads(self, zero, zero, zero + self.shift, zero)

    def __repr__(self) -> str:
        return f"predicate({getattr(self.function, '__name__', repr(self.function))})"


def predicate(
    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], *, batch: int | None = None, heads: int | None = None
) -> Mask:
    """Your own rule: `function(b, h, i, j) -> bool tensor` on index tensors. Layouts look into every tile.

    A rule that reads b (or h) says for how many batch rows (or heads) it is made; others serve any number. It may read
    tensors of its own, and what is written into them counts; for other numbers build a new function. Index tensors
    come as what broadcasts; a function that then answers otherwise than for one entry is asked entry by entry.
    """
    if not callable(function):
        raise TypeError(f"predicate: function must be callable (got {type(function).__name__})")
    sizes = []
    for axis, (index, name, size) in enumerate((("b", "batch", batch), ("h", "heads", heads))):
        if size is None and reads_index(function, axis):
            raise ValueError(f"predicate: {name} is missing (got a function that reads {index}); expected its size")
        sizes.append(1 if size is None else checks.integer(f"predicate: {name}", size))
    return Predicate(function, (sizes[0], sizes[1]))


def reads_index(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], axis: int) -> bool:
    """Whether the function's answer has that one of its indices in its shape; where it has no such shape, whether the
    function looks at the index at all."""
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long)
    index = [zero.expand(2, 1, 1, 1).movedim(0, n) if n == axis else zero.clone() for n in range(4)]
    with rules.Watch(tuple(index)) as watch:
        try:
            answer = function(*index)
        except (
            Exception
        ):  # it may have no position 0, or a device of its own; a kernel that asks in earnest will say so
            answer = None
    if isinstance(answer, Tensor) and answer.dim() == 4:
        return answer.shape[axis] == 2
    return not (isinstance(answer, Tensor) and answer.dim() == 0) and id(index[axis]) in watch.touched
