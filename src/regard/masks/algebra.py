"""Masks as values: a predicate on index tensors, and `&`, `|`, `~` to combine them.

    allowed[b, h, t, j] = mask(b, h, i, j)    with    i = t + S - T

i and j are absolute positions counted from the first key; T queries against S keys are the last T positions,
so that causality is aligned bottom right. With T > S the first queries have i < 0. True = may attend.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.masks import layout, picture, torch_blocks
from regard.masks.checks import lengths
from regard.masks.verdict import Tiles, Verdict

Index = Int[Tensor, "..."]


class Mask(ABC):
    """Which keys a query may attend to. Immutable; a subclass need only say `__call__`."""

    asks: ClassVar[bool] = False
    """True where it asks a function, which may read tensors: equal masks need not stay so."""

    @abstractmethod
    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        """True where batch b, head h, query position i may see key position j; broadcasts with them."""

    def judge(self, tiles: Tiles) -> Verdict:
        """What is certain about whole tiles; broadcasts to (batch, heads, rows, columns)."""
        return Verdict.unknown(tiles)

    @property
    def batch(self) -> int:
        """1, or the batch size that the mask is made for."""
        return 1

    @property
    def heads(self) -> int:
        """1, or the number of heads that the mask is made for."""
        return 1

    @property
    def span(self) -> tuple[int | float, int | float]:
        """(back, ahead), may be infinite: whatever is allowed has -ahead <= i - j <= back."""
        return math.inf, math.inf

    @property
    def is_shift_invariant(self) -> bool:
        """Whether it provably depends on i - j alone."""
        return False

    @property
    def grain(self) -> tuple[int, int] | None:
        """The (query, key) blocks it is made of, if it is: the cut that suits a block-sparse kernel best."""
        return None

    def to(self, device: torch.device | str) -> "Mask":
        """The same mask with the tensors it holds on `device`."""
        return self

    @property
    def reach(self) -> int | None:
        """How many keys back, its own included, a query can see at most. None: no bound is known."""
        back = self.span[0]
        return None if back == math.inf else int(max(back + 1, 0))

    @property
    def is_causal(self) -> bool:
        """Whether it provably never allows j > i."""
        return self.span[1] <= 0

    def at(self, i: Int[Tensor, " t"], j: Int[Tensor, " s"]) -> Bool[Tensor, "batch heads t s"]:
        """The mask on rows `i` and columns `j`, given as positions."""
        b = torch.arange(self.batch, device=i.device)[:, None, None, None]
        h = torch.arange(self.heads, device=i.device)[:, None, None]
        allowed = self(b, h, i[:, None], j)
        return allowed.broadcast_to(self.batch, self.heads, i.shape[0], j.shape[0])

    def dense(
        self, T: int, S: int | None = None, *, device: torch.device | str | None = None
    ) -> Bool[Tensor, "batch heads T S"]:
        """The whole mask as a tensor. Grows as T x S; `layout` does not."""
        T, S = lengths("dense", T, S)
        return self.at(torch.arange(S - T, S, device=device), torch.arange(S, device=device))

    def layout(self, T: int, S: int | None = None, *, block: int | tuple[int, int] = 128) -> "layout.BlockLayout":
        """Which blocks hold anything, and which of them are full, on the CPU and without forming T x S."""
        return layout.layout(self.to("cpu"), *lengths("layout", T, S), block)

    def count(self, T: int, S: int | None = None) -> int:
        """How many (batch, head, query, key) entries are allowed, exactly and without forming T x S."""
        return layout.count(self.to("cpu"), *lengths("count", T, S))

    def density(self, T: int, S: int | None = None) -> float:
        """The allowed share of all entries (0 where there are none)."""
        T, S = lengths("density", T, S)
        return self.count(T, S) / max(1, self.batch * self.heads * T * S)

    def mask_mod(self, T: int, S: int | None = None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The function that torch's FlexAttention asks for; its query index counts from the first query."""
        T, S = lengths("mask_mod", T, S)

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return self(b, h, q_idx + (S - T), kv_idx)

        return mask_mod

    def block_mask(
        self,
        T: int,
        S: int | None = None,
        *,
        block: int | tuple[int, int] = 128,
        device: torch.device | str | None = None,
    ) -> Any:
        """torch's BlockMask, for torch.nn.attention.flex_attention with T queries and S keys.

        Its blocks are those of `layout`, found without forming T x S; a mask that is the same for all batch rows (or
        heads) has one, which torch repeats. `masks.from_block_mask` is the way back.
        """
        return torch_blocks.block_mask(self, *lengths("block_mask", T, S), block, device)

    def picture(self, T: int = 32, S: int | None = None, *, b: int = 0, h: int = 0) -> str:
        """Queries down, keys across, for the terminal; long sequences are pooled to shades."""
        return picture.text(self.to("cpu"), *lengths("picture", T, S), b, h)

    def svg(self, T: int = 32, S: int | None = None, *, b: int = 0, h: int = 0) -> str:
        """The same as a standalone SVG that suits light and dark pages."""
        return picture.svg(self.to("cpu"), *lengths("svg", T, S), b, h)

    def __and__(self, other: "Mask") -> "Mask":
        return _join(And, self, other) if isinstance(other, Mask) else _refuse("&", other)

    def __or__(self, other: "Mask") -> "Mask":
        return _join(Or, self, other) if isinstance(other, Mask) else _refuse("|", other)

    def __invert__(self) -> "Mask":
        return self.part if isinstance(self, Not) else Not(self)

    def __bool__(self) -> bool:
        raise TypeError("mask: a mask has no truth value; combine masks with &, | and ~ (not and, or, not)")


@dataclass(frozen=True, repr=False)
class Joined(Mask):
    """Several masks as one."""

    parts: tuple[Mask, ...]

    def __post_init__(self) -> None:
        for what in ("batch", "heads"):
            sizes = sorted({getattr(part, what) for part in self.parts} - {1})
            if len(sizes) > 1:
                raise ValueError(f"mask: cannot combine {what} sizes (got {sizes} in {self!r}); expected equal or 1")

    @property
    def batch(self) -> int:
        return math.prod({part.batch for part in self.parts})

    @property
    def heads(self) -> int:
        return math.prod({part.heads for part in self.parts})

    @property
    def is_shift_invariant(self) -> bool:
        return all(part.is_shift_invariant for part in self.parts)

    @property
    def grain(self) -> tuple[int, int] | None:
        return next((part.grain for part in self.parts if part.grain is not None), None)

    def to(self, device: torch.device | str) -> Mask:
        return type(self)(tuple(part.to(device) for part in self.parts))


class And(Joined):
    """Allowed where every part allows."""

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        allowed = self.parts[0](b, h, i, j)
        for part in self.parts[1:]:
            allowed = allowed & part(b, h, i, j)
        return allowed

    def judge(self, tiles: Tiles) -> Verdict:
        verdict = self.parts[0].judge(tiles)
        for part in self.parts[1:]:
            verdict = verdict & part.judge(tiles)
        return verdict

    @property
    def span(self) -> tuple[int | float, int | float]:
        return min(part.span[0] for part in self.parts), min(part.span[1] for part in self.parts)

    def __repr__(self) -> str:
        return " & ".join(f"({part!r})" if isinstance(part, Or) else repr(part) for part in self.parts)


class Or(Joined):
    """Allowed where any part allows."""

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        allowed = self.parts[0](b, h, i, j)
        for part in self.parts[1:]:
            allowed = allowed | part(b, h, i, j)
        return allowed

    def judge(self, tiles: Tiles) -> Verdict:
        verdict = self.parts[0].judge(tiles)
        for part in self.parts[1:]:
            verdict = verdict | part.judge(tiles)
        return verdict

    @property
    def span(self) -> tuple[int | float, int | float]:
        return max(part.span[0] for part in self.parts), max(part.span[1] for part in self.parts)

    def __repr__(self) -> str:
        return " | ".join(f"({part!r})" if isinstance(part, And) else repr(part) for part in self.parts)


@dataclass(frozen=True, repr=False)
class Not(Mask):
    """Allowed where the part does not allow."""

    part: Mask

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        return ~self.part(b, h, i, j)

    def judge(self, tiles: Tiles) -> Verdict:
        return ~self.part.judge(tiles)

    @property
    def batch(self) -> int:
        return self.part.batch

    @property
    def heads(self) -> int:
        return self.part.heads

    @property
    def is_shift_invariant(self) -> bool:
        return self.part.is_shift_invariant

    def to(self, device: torch.device | str) -> Mask:
        return Not(self.part.to(device))

    def __repr__(self) -> str:
        return f"~({self.part!r})" if isinstance(self.part, Joined) else f"~{self.part!r}"


def _join(kind: type[Joined], left: Mask, right: Mask) -> Mask:
    """Flat, so that a & b & c is one value however it was bracketed."""
    parts = [m.parts if isinstance(m, kind) else (m,) for m in (left, right)]
    return kind(parts[0] + parts[1])


def _refuse(sign: str, other: object) -> Mask:
    hint = "; wrap a tensor in masks.dense(...)" if isinstance(other, Tensor) else ""
    raise TypeError(f"mask {sign}: expected a Mask (got {type(other).__name__}){hint}")


def by_value(mask: Mask) -> bool:
    """Whether equal masks compare equal, so that a cache may know them; not so for those that hold or read tensors."""
    if isinstance(mask, Joined):
        return all(map(by_value, mask.parts))
    if isinstance(mask, Not):
        return by_value(mask.part)
    return type(mask).__eq__ is not object.__eq__ and not mask.asks
