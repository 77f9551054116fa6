"""Selective copying: say again the few symbols that stood scattered among blanks, in their order.

    0 x_1 0 0 x_2 ... x_n 0 | ? ? ... ?        at the i-th question mark, name x_i

Gu, Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752). Where
copying can be done by place alone, this takes knowing which tokens matter. Otherwise as `regard.tasks.copying`.
"""

from dataclasses import dataclass
from typing import ClassVar

from regard.tasks import Defaults, TaskError, whole
from regard.tasks.copying import Copying


@dataclass(frozen=True)
class SelectiveCopying(Copying):
    """The symbols stand anywhere in the first `length` tokens."""

    name: ClassVar[str] = "selective_copying"
    gist: ClassVar[str] = "Say again, in order, the symbols that stood scattered among blanks."
    defaults: ClassVar[Defaults] = Defaults(
        steps=500, batch=64, dim=64, depth=2, heads=2, lr=3e-3, mechanisms=("softmax", "rotary", "window(window=16)")
    )
    scattered: ClassVar[bool] = True

    symbols: tuple[int, ...] = (2, 4, 8)
    length: int = 32

    def __post_init__(self) -> None:
        whole(self, {"vocab": 3, "symbols": 1, "length": 1, "heldout": 1})
        if max(self.symbols) > self.length:
            most = max(self.symbols)
            raise TaskError(f"task selective_copying: length must be >= {most} for its symbols, got {self.length}")

    @property
    def room(self) -> int:
        return self.length
