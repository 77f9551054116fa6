"""Keys and values that lie in pages of a pool, and where: what `paged` reads as it lies, and others have gathered."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pages:
    """Rows of a batch as pages. Key n of a row is token start + n of its pages; shorter rows stand at the end of S."""

    k: Float[Tensor, "P G page D"]
    v: Float[Tensor, "P G page V"]
    table: Sequence[Int[Tensor, " n"]]
    """Of each row, which pages it has, in order (int32, perhaps with room behind)."""
    start: Sequence[int]
    count: Sequence[int]
    length: int
    """S: the most keys that a row has."""

    def stand_ins(self) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S V"]]:
        """What has the shape of all keys and values, and holds nothing."""
        B, S = len(self.table), self.length
        k, v = (z.new_empty(1).expand(B, z.shape[1], S, z.shape[3]) for z in (self.k, self.v))
        return k, v

    def gathered(self) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S V"]]:
        """All keys and values, copied together."""
        k, v = (gather(z, self.table, self.start, self.count, self.length) for z in (self.k, self.v))
        return k, v


def gather(pages: Tensor, table: Sequence[Tensor], start: Sequence[int], count: Sequence[int], length: int) -> Tensor:
    """Tokens of the pool's (P, ..., page, width) as (B, ..., length, width), with zeros before shorter rows."""
    inner, (page, width) = pages.shape[1:-2], pages.shape[-2:]
    if len(set(zip(start, count, strict=True))) != 1 or count[0] != length:  # rows that lie differently, or none
        rows = [gather(pages, [t], [s], [n], n) for t, s, n in zip(table, start, count, strict=True)]
        rows = [F.pad(row, (0, 0, length - row.shape[-2], 0)) for row in rows]
        return torch.cat(rows) if rows else pages.new_zeros(0, *inner, length, width)
    used = -(-(start[0] + length) // page)
    heads = inner.numel()
    at = torch.stack([t[:used] for t in table]).to(pages.device, torch.long)[:, None] * heads
    at = at + torch.arange(heads, device=pages.device)[:, None]
    found = pages.view(-1, page * width).index_select(0, at.flatten())
    return found.view(len(table), *inner, used * page, width)[..., start[0] : start[0] + length, :]
