"""A pool of pages: memory of a fixed size, from which sequences take pages of a few tokens when they need them.

A page has as many owners as there are sequences that hold it, and is free again when the last of them lets go: the
paging of Kwon et al. 2023 (PagedAttention, https://arxiv.org/abs/2309.06180). The paper's text was not to be had; what
is here follows what others write of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Self

import torch
from jaxtyping import Int32
from torch import Tensor

from regard.checks import refuse, whole


class PagePool:
    """`num_pages` pages of `page_size` tokens. All states that share it keep the same of a token: the first one says
    what, and only then is memory taken.

    Args:
        num_pages: how many; a page of a layer holds page_size * num_kv_heads * 2 * head_dim numbers.
        page_size: tokens in a page.

    Attributes:
        buffers: by name (num_pages, ..., page_size, width): `k`, `v`, and for layers that keep more of a token that.
    """

    def __init__(self, num_pages: int, *, page_size: int = 16) -> None:
        whole(self, num_pages=num_pages, page_size=page_size)
        self.num_pages, self.page_size = num_pages, page_size
        self.buffers: dict[str, Tensor] = {}
        self._free = list(range(num_pages - 1, -1, -1))
        with torch.inference_mode(False):  # else nobody could write to it outside of that
            self._owners = torch.zeros(num_pages, dtype=torch.int32, device="cpu")

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def used_pages(self) -> int:
        return self.num_pages - len(self._free)

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page."""
        return sum(b[0].numel() * b.element_size() for b in self.buffers.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use; one that several sequences share counts once."""
        return self.used_pages * self.page_nbytes

    def lay_out(self, like: Mapping[str, Tensor]) -> None:
        """Take memory for tokens of which this is kept, by name (batch, ..., tokens, width); once. ValueError if the
        pool holds something else already."""
        if not self.buffers:
            with torch.inference_mode(False):
                for name, z in like.items():
                    size = (self.num_pages, *z.shape[1:-2], self.page_size, z.shape[-1])
                    self.buffers[name] = torch.zeros(size, dtype=z.dtype, device=z.device)
            return
        if not self.holds(like):
            got = f"{_kept(self.buffers)}"
            refuse(self, "pool", "holds tokens of another kind", got, f"{_kept(like)}, or a pool of its own")

    def holds(self, like: Mapping[str, Tensor]) -> bool:
        """Whether its pages are for tokens of which this is kept."""
        return _kept(self.buffers) == _kept(like)

    def need(self, pages: int) -> None:
        """ValueError if fewer than so many pages are free."""
        if pages > len(self._free):
            refuse(
                self,
                "num_pages",
                f"is too small: {pages} more page{'s' * (pages != 1)} of {self.page_size} tokens needed and "
                f"{len(self._free)} free; nothing was written",
                self.num_pages,
                f"at least {self.used_pages + pages}, or states let go of",
            )

    def take(self, pages: int) -> list[int]:
        """So many free pages, each with one owner now. ValueError if there are fewer."""
        self.need(pages)
        taken = [self._free.pop() for _ in range(pages)]
        self._owners[taken] = 1
        return taken

    def share(self, pages: Sequence[int] | Int32[Tensor, " n"]) -> None:
        """One owner more for each of these pages."""
        self._owners[self._held(pages)] += 1

    def free(self, pages: Sequence[int] | Int32[Tensor, " n"]) -> None:
        """One owner less for each of these pages; those without any are free."""
        held = self._held(pages)
        self._owners[held] -= 1
        self._free += held[self._owners[held] == 0].tolist()

    def _held(self, pages: Sequence[int] | Tensor) -> Tensor:
        """Their numbers, each of which must be in use."""
        at = torch.as_tensor(pages, dtype=torch.long, device="cpu")
        if at.numel() and not 0 <= int(at.min()) <= int(at.max()) < self.num_pages:
            refuse(self, "pages", "are out of range", at.tolist(), f"numbers from 0 to {self.num_pages - 1}")
        if bool((self._owners[at] == 0).any()):
            gone = at[self._owners[at] == 0].tolist()
            refuse(self, "pages", "are free, and nobody's", gone, "pages that were taken and not freed")
        return at

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # copies of states take pages from the same pool

    def __reduce__(self) -> NoReturn:
        raise TypeError("PagePool: can't be pickled, its pages belong to all states that share it; save their tokens")


def _kept(buffers: Mapping[str, Tensor]) -> dict[str, str]:
    """What is kept of a token, in words."""
    return {n: f"{(*b.shape[1:-2], b.shape[-1])} {b.dtype} on {b.device}" for n, b in buffers.items()}
