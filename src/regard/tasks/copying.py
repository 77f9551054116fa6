"""Copying: say a string again, symbol by symbol, when it is over.

    x_1 x_2 ... x_n 0 ... 0 | ? ? ... ?        at the i-th question mark, name x_i

The task of Hochreiter, Schmidhuber 1997, "Long Short-Term Memory" (Neural Computation 9), with blanks in place of the
answers as in Arjovsky, Shah, Bengio 2016, "Unitary Evolution Recurrent Neural Networks" (arXiv 1511.06464). Answers
begin at the same place for every n. The host brings learned positions, for every mechanism.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as counting
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from regard.tasks import Batch, Defaults, Metric, counts
from regard.tasks._labelled import IGNORED, Labelled

BLANK, ASK = 0, 1
"""Symbols that are never to be copied."""
COPIED = Metric("accuracy", "accuracy", better=1, main="mean", along="symbols", loss="bits", percent=True)


def strings(
    count: int, symbols: int, room: int, most: int, vocab: int, generator: torch.Generator, *, scattered: bool
) -> tuple[Int[Tensor, "count length"], Int[Tensor, "count length"]]:
    """Inputs, and labels that are -100 but at the first `symbols` of `most` question marks.

    The symbols stand in the first places of `room`, or are scattered over it in their order; the rest is blank.
    """
    drawn = torch.randint(2, vocab, (count, symbols), generator=generator)
    places = torch.rand(count, room, generator=generator).argsort(1)[:, :symbols].sort(1).values
    if not scattered:
        places = torch.arange(symbols).expand(count, -1)
    seen = torch.full((count, room), BLANK).scatter(1, places, drawn)
    asked = torch.full((count, most), ASK)
    answers = torch.full((count, most), IGNORED)
    answers[:, :symbols] = drawn
    return torch.cat([seen, asked], 1), torch.cat([torch.full_like(seen, IGNORED), answers], 1)


@dataclass(frozen=True)
class Copying(Labelled):
    """A batch has one number of symbols, each in its turn."""

    name: ClassVar[str] = "copying"
    gist: ClassVar[str] = "Say a string of symbols again when it is over."
    metric: ClassVar[Metric] = COPIED
    positions: ClassVar[bool] = True
    defaults: ClassVar[Defaults] = Defaults(steps=300, batch=64, dim=64, depth=2, heads=2, lr=3e-3)
    scattered: ClassVar[bool] = False

    vocab: int = 16
    symbols: tuple[int, ...] = (4, 8, 16, 32)

    def __post_init__(self) -> None:
        counts(self, vocab=3, symbols=1, heldout=1)

    @property
    def room(self) -> int:
        """Tokens before the first question mark."""
        return max(self.symbols)

    @property
    def tokens(self) -> int:
        return self.room + max(self.symbols)

    def describe(self) -> str:
        return f"{', '.join(map(str, self.symbols))} of {self.vocab - 2} symbols, generated"

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for n in counting():
            yield self._strings(batch, self.symbols[n % len(self.symbols)], generator)

    def questions(self, count: int, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for symbols in self.symbols:
            yield (f"{symbols}", *self._strings(count, symbols, generator))

    def _strings(self, count: int, symbols: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        most, scattered = max(self.symbols), self.scattered
        return strings(count, symbols, self.room, most, self.vocab, generator, scattered=scattered)
