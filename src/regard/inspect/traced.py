"""What pages and analyses ask of a trace."""

from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from regard.inspect.inputs import Tokens
from regard.inspect.layers import LayerTrace
from regard.inspect.statistics import HeadStatistics


class Traced(Protocol):
    """A `regard.inspect.trace.Trace`, as far as others than itself read it."""

    @property
    def layers(self) -> tuple[LayerTrace, ...]: ...
    @property
    def tokens(self) -> Tokens | None: ...
    @property
    def decoder_tokens(self) -> Tokens | None: ...
    @property
    def images(self) -> Float[Tensor, "B 3 Y X"] | None: ...
    @property
    def grid(self) -> tuple[int, int] | None: ...
    @property
    def extra_tokens(self) -> int: ...
    @property
    def output(self) -> Any: ...
    @property
    def model(self) -> str: ...
    def statistics(self) -> list[HeadStatistics]: ...
