"""The slots of the pipeline: what may fill each, and where it works. Said here once, for the layer, kernels, cards and
drop-ins. A new one is a line in `Slots` and one in `Filled`."""

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

from regard.masks import Mask
from regard.stages import Gate, HeadMap, Memory, Mix, Normalizer, Position, Score, Selector, Stage

Site = Literal["mask", "heads", "position", "score", "scores", "normalise", "weights", "select", "gate"]
"""Where in the pipeline a slot works. Those at "scores" and "weights" are mixes, applied in the order of `Slots`."""


class Slots(TypedDict, total=False):
    """The slots by name: what may fill each, and where it works. Empty ones are plain softmax attention's."""

    mask: Annotated[Mask | None, "mask"]
    """A static pattern."""
    heads: Annotated[HeadMap | None, "heads"]
    position: Annotated[Position | None, "position"]
    score: Annotated[Score | None, "score"]
    score_mix: Annotated[Mix | None, "scores"]
    normalizer: Annotated[Normalizer | None, "normalise"]
    memory: Annotated[Memory | None, "normalise"]
    weight_mix: Annotated[Mix | None, "weights"]
    selector: Annotated[Selector | None, "select"]
    gate: Annotated[Gate | None, "gate"]


class InnerSlots(TypedDict, total=False):
    """Those of `Slots` that work on queries, keys and values alone, so that `regard.attention` has them too."""

    position: Position | None
    score: Score | None
    score_mix: Mix | None
    normalizer: Normalizer | None
    memory: Memory | None
    weight_mix: Mix | None
    selector: Selector | None


@dataclass(eq=False, kw_only=True)  # frozen it would take four times as long to make, some 2 us of a small call's 20
class Filled:
    """What fills the slots that kernels work through; None is plain softmax attention."""

    position: Position | None = None
    """Only its `bias` and `values` hooks count here; `embed` and `rotate` came before."""
    score: Score | None = None
    score_mix: Mix | None = None
    normalizer: Normalizer | None = None
    memory: Memory | None = None
    weight_mix: Mix | None = None

    @property
    def position_bias(self) -> Position | None:
        """The position, if it adds to the scores."""
        return self.position if self.position is not None and self.position.changes("bias") else None

    @property
    def position_values(self) -> Position | None:
        """The position, if it adds to the outputs."""
        return self.position if self.position is not None and self.position.changes("values") else None

    @property
    def cap(self) -> float | None:
        """The soft cap on the scores, if that is all that a mix does to them."""
        return None if self.score_mix is None else self.score_mix.cap

    @property
    def stages(self) -> list[Stage]:
        """The stages that are not plain softmax attention, in order."""
        position = self.position_bias or self.position_values
        filled = (getattr(self, name) for name in IN_KERNELS if name != "position")
        return [stage for stage in (position, *filled) if stage is not None]

    @property
    def mixes(self) -> list[tuple[str, Mix]]:
        """(slot, mix) of all that map scores to scores or weights to weights."""
        found = ((name, getattr(self, name)) for name in IN_KERNELS if SLOTS[name].site in ("scores", "weights"))
        return [(name, mix) for name, mix in found if mix is not None]

    @property
    def across(self) -> bool:
        """Whether a mix reads other heads or rows than the one it gives, as far as anybody knows."""
        return any(mix.sees != "pair" for _, mix in self.mixes)

    @property
    def pair_mix(self) -> Mix | None:
        """What is done to scores, if it looks at one pair at a time."""
        return self.score_mix if self.score_mix is not None and self.score_mix.sees == "pair" else None

    @property
    def halo(self) -> int:
        """Earlier query rows that any row needs."""
        return sum(stage.halo for stage in self.stages)


class Slot(NamedTuple):
    """One line of `Slots`."""

    kind: type
    site: Site


def _slots() -> Iterator[tuple[str, Slot]]:
    for name, hint in typing.get_type_hints(Slots, include_extras=True).items():
        union, site = typing.get_args(hint)
        yield name, Slot(typing.get_args(union)[0], site)


SLOTS: dict[str, Slot] = dict(_slots())
IN_KERNELS = tuple(Filled.__dataclass_fields__)
"""The slots that a kernel's problem holds."""
BEYOND = ("num_kv_heads", "kernel")
"""What a mechanism may set of `regard.Attention` besides the slots."""


def slot_of(part: Any) -> str | None:
    """The slot that a part fills, where its kind fills only one; None where several would take it, or none."""
    able = [name for name, slot in SLOTS.items() if isinstance(part, slot.kind)]
    return able[0] if len(able) == 1 else None
