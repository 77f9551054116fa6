"""A mix that looks at one pair at a time, from a function as FlexAttention takes it; and functions given as parts.

    score'[b, h, t, j] = function(score[b, h, t, j], b, h, i, j)

i and j are positions counted from the first key, as in masks: for the last of T queries i = S - 1, at every step of a
stream too. torch's q_idx counts from the first query instead, which is the same where T = S.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard import rules
from regard.checks import refuse
from regard.masks import Mask
from regard.masks.tensors import predicate, reads_index
from regard.stages import Mix, Rows

ScoreFunction = Callable[..., Tensor]
"""(score, b, h, q_idx, kv_idx) -> score."""


class PairMix(Mix):
    """Maps every score by itself: `function(score, b, h, q_idx, kv_idx)`, of scaled scores in natural units.

    It is called on tensors that broadcast (score (B, H, t, s), b (B, 1, 1, 1), h (H, 1, 1), q_idx (t, 1), kv_idx (s)),
    of any rectangle of the score matrix; a function that then answers otherwise than for one entry is asked entry by
    entry. Pairs that it gives -inf count as masked, and those that the mask hides are hidden whatever it gives.

    Args:
        function: a module is part of this one, with its parameters.
        tensors: what the function takes by name besides: parameters stay such, other tensors move and are saved too.
            Tensors that it closes over get their gradients, but are nobody's to move or save.
    """

    sees = "pair"

    def __init__(self, function: ScoreFunction, **tensors: Tensor) -> None:
        super().__init__()
        if not callable(function) or isinstance(function, type):
            refuse(
                self, "function", "is none", type(function).__name__, "f(score, b, h, q_idx, kv_idx)", error=TypeError
            )
        self.names = tuple(tensors)
        for name, value in tensors.items():
            if not isinstance(value, Tensor):
                refuse(self, name, "has the wrong type", type(value).__name__, "a Tensor", error=TypeError)
            if hasattr(self, name):
                refuse(self, name, "is a name of modules", name, "another one")
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)
        self.function = function

    def pair(self, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """The function itself, with the tensors that it takes by name."""
        return self.function(score, b, h, i, j, **{name: getattr(self, name) for name in self.names})

    def forward(self, z: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "B H t s"]:
        if z.is_meta:
            return z
        if rows.allowed is not None and z.requires_grad:  # no slope of a hidden pair, NaN perhaps, reaches q and k
            z = z.masked_fill(~rows.allowed, 0.0)
        out = self._asked(z, *self._index(z, rows))
        if not out.is_floating_point():
            refuse(self, "function", "gives no scores", out.dtype, "floating point", error=TypeError)
        return out.to(z.dtype).expand(z.shape)

    def reads(self, z: Float[Tensor, "B H t s"], rows: Rows) -> list[Tensor] | None:
        """The tensors that the function reads of its own and that take gradients. None where not all can be told."""
        given = (z.detach(), *self._index(z, rows))
        found = rules.reads(self._asked, *given)
        if found is None:
            return None
        found = [t for t in found if t.requires_grad]
        with torch.enable_grad(), rules.Watch(given, {id(t): t.detach() for t in found}):
            return None if self._asked(*given).requires_grad else found

    def _index(self, z: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        b = torch.arange(z.shape[0], device=z.device)[:, None, None, None]
        h = torch.arange(z.shape[1], device=z.device)[:, None, None]
        return b, h, rows.i[:, None], rows.j

    def _asked(self, *given: Tensor) -> Tensor:
        return rules.entries(type(self).__name__, self.pair, *given, key=self.function)

    def extra_repr(self) -> str:
        if isinstance(self.function, nn.Module):
            return ""
        return str(getattr(self.function, "__name__", None) or type(self.function).__name__)


def as_parts(slots: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a plain function of five arguments at `score_mix` as a part."""
    given = slots.get("score_mix")
    if given is None or isinstance(given, Mix) or not rules.takes(given, 5):
        return dict(slots)
    return {**slots, "score_mix": PairMix(given)}


def as_mask(given: Any, batch: int | None = None, heads: int | None = None) -> Any:
    """The same, or a mask where it is a plain function of four arguments; for so many batch rows and heads."""
    if given is None or isinstance(given, Mask | Tensor) or not rules.takes(given, 4):
        return given
    # Only where a rule asks for sizes: int() would fix one that torch.export leaves open.
    sizes = [int(n) if n is not None and reads_index(given, axis) else None for axis, n in enumerate((batch, heads))]
    return predicate(given, batch=sizes[0], heads=sizes[1])
