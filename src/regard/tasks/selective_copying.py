"""Selective copying: say again the few symbols that stood scattered among blanks, in their order.

    0 x_1 0 0 x_2 ... x_n 0 | ? ? ... ?        at the i-th question mark, name x_i

Gu, Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752). Where
copying can be done by place alone, this takes knowing which tokens matter. Otherwise as `regard.tasks.copying`.
"""

from dataclasses import dataclass
from typing import ClassVar

from regard.checks import refuse
from regard.tasks import Defaults, counts
from regard.tasks.copying import Copying


@dataclass(frozen=True)
class SelectiveCopying(Copying):
    """The symbols stand anywhere in the first `length` tokens."""

    name: ClassVar[str] = "selective_copying"
    gist: ClassVar[str] = "Say again, in order, the symbols that stood scattered among blanks."
    defaults: ClassVar[Defaults] = Defaults(steps=500, batch=64, dim=64, depth=2, heads=2, lr=3e-3)
    scattered: ClassVar[bool] = True

    symbols: tuple[int, ...] = (2, 4, 8)
    length: int = 32

    def __post_init__(self) -> None:
        counts(self, vocab=3, symbols=1, length=1, heldout=1)
        if max(self.symbols) > self.length:
            refuse(self, "length", "is too small for its symbols", self.length, f"an int >= {max(self.symbols)}")

    @property
    def room(self) -> int:
        return self.length
