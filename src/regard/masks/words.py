"""Masks that are made of token ids: tokens that occur again, and the sentences between marks."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.checks import refuse, whole
from regard.masks import checks
from regard.masks.algebra import Index, Mask
from regard.masks.patterns import offset
from regard.masks.stamp import made_of
from regard.masks.tensors import _look_up, documents, padding
from regard.masks.verdict import Tiles, Verdict


@dataclass(frozen=True, eq=False, repr=False)
class Queries(Mask):
    """which[b, i]."""

    which: Bool[Tensor, "B S"]

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        which, inside = _look_up(self.which, b, i)
        return which.bool() & inside

    def judge(self, tiles: Tiles) -> Verdict:
        width = self.which.shape[1]
        low, end = tiles.i_lo.flatten(), tiles.i_hi.flatten() + 1
        count = self._before[:, end.clamp(0, width)] - self._before[:, low.clamp(0, width)]
        shape = (-1, 1, *tiles.i_lo.shape[-2:])
        return Verdict.exact((count > 0).view(shape), (count == end - low).view(shape))

    @made_of("which")
    def _before(self) -> Int[Tensor, "B P"]:
        """How many queries before each one see all."""
        return torch.nn.functional.pad(self.which.cumsum(1, dtype=torch.int32), (1, 0))

    @property
    def batch(self) -> int:
        return self.which.shape[0]

    def to(self, device: torch.device | str) -> Mask:
        return self if self.which.device == torch.device(device) else Queries(self.which.to(device))

    def __repr__(self) -> str:
        return f"queries(<{'x'.join(map(str, self.which.shape))}>)"


def queries(which: Bool[Tensor, " S"] | Bool[Tensor, "B S"]) -> Mask:
    """The marked tokens see every key, the others none: `| queries(...)` lets them see all whatever a mask says."""
    checks.tensor("queries: which", which, (1, 2), "bool")
    return Queries(which if which.ndim == 2 else which[None])


def same_token(ids: Int[Tensor, " S"] | Int[Tensor, "B S"], *, itself: bool = False) -> Mask:
    """ids[i] == ids[j]: a token sees where it occurs elsewhere; one that occurs only once sees all.

    Args:
        ids: of the tokenizer; one row serves every batch entry.
        itself: whether a token sees its own place, too. Then one that occurs only once sees that alone.
    """
    checks.tensor("same_token: ids", ids, (1, 2), "integer")
    if itself:
        return documents(ids)
    ids = ids if ids.ndim == 2 else ids[None]
    ordered, order = ids.sort(-1)
    change = torch.nn.functional.pad(ordered.diff(dim=-1) != 0, (1, 1), value=True)
    lonely = torch.zeros_like(ids, dtype=torch.bool).scatter(1, order, change[:, 1:] & change[:, :-1])
    return (documents(ids) & ~offset(0)) | queries(lonely)


def segments(
    ids: Int[Tensor, " S"] | Int[Tensor, "B S"] | Bool[Tensor, " S"] | Bool[Tensor, "B S"],
    *,
    begin: int | None = None,
    end: int | None = None,
) -> Mask:
    """Tokens see only their own segment. One row serves every batch entry.

    Args:
        ids: of tokens: a segment goes from a token `begin` to the next token `end`, both included; tokens of no
            segment see nothing and are seen by none. Or bools, True where a segment begins; then each ends where
            the next one begins.
        begin, end: the ids of the marks, two different ones; neither with bools.
    """
    if isinstance(ids, Tensor) and ids.dtype == torch.bool:
        checks.tensor("segments: ids", ids, (1, 2), "bool")
        if (begin, end) != (None, None):
            refuse("segments", "begin, end", "are not used", f"{begin}, {end}", "neither where borders are given")
        return documents(ids.cumsum(-1))
    checks.tensor("segments: ids", ids, (1, 2), "integer")
    whole("segments", 0, begin=begin, end=end)
    if begin == end:
        refuse("segments", "begin, end", "are one token", begin, "two different ones")
    ids = ids if ids.ndim == 2 else ids[None]
    begins, ends = ids.eq(begin).cumsum(-1), ids.eq(end)  # type: ignore[arg-type]
    number = ends.cumsum(-1) - ends.long()  # how many ends stand before: a token's own end is that one
    opened = torch.nn.functional.pad(torch.where(ends, begins, 0), (1, 0))[:, :-1].cummax(-1).values
    inside = (begins > opened) & (number < ends.sum(-1, keepdim=True))
    return documents(number.where(inside, -1)) & padding(inside)
