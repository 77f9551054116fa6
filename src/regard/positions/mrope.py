"""Multimodal rotary positions (M-RoPE): pairs of channels are dealt to time, height and width."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.cards import Card, Paper
from regard.checks import checked, choice, refuse, whole
from regard.positions._shared import angles
from regard.positions.rotary import CARD as ROTARY
from regard.positions.rotary import Rotary, Scaling

CARD = Card(
    "mrope",
    equation="""rotary for tokens at (t, y, x): pair a turns by the angle p w_a, where p is that coordinate of the token
to which the pair belongs, and w_a = base^(-2a/D) as ever; a token of text stands at (p, p, p)""",
    papers=(
        Paper(
            "Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution",
            "Wang et al.",
            2024,
            "2409.12191",
            "not its own text, but its code in transformers, as of Qwen2.5-VL, Qwen3-VL and Ernie 4.5 VL",
        ),
    ),
    traits=ROTARY.traits,
    cost=ROTARY.cost,
    claim="Text turns as by plain rotary, and pictures by the distance along each axis: "
    "tests/positions/test_mrope.py::test_text_turns_as_ever_and_pictures_along_each_axis.",
    verified="third-party",
    tries={"mrope_section": ..., "order": ...},  # text alone can't tell them
    defaults={
        "mrope_section": "code, Qwen2-VL",
        "order": "code, Qwen2-VL",
        "base": "code, Qwen2-VL",
        "interleaved": "code, Qwen2-VL",
        "partial_rotary_factor": "code, Qwen2-VL",
    },
)


def axis_of_pairs(sections: tuple[int, ...], order: str) -> tuple[int, ...]:
    """The axis that each pair belongs to.

    "chunks": axis after axis. "interleaved": the axes in turn, and the first one has what the others leave.
    "alternating": the others in turn, then the first.
    """
    n, others = len(sections), range(1, len(sections))
    if order == "chunks":
        return tuple(axis for axis, size in enumerate(sections) for _ in range(size))
    if order == "interleaved":
        places = range(sum(sections))
        return tuple(a if (a := p % n) in others and p < n * sections[a] else 0 for p in places)
    turns = [axis for k in range(max(sections[1:], default=0)) for axis in others if k < sections[axis]]
    return (*turns, *(0,) * sections[0])


@CARD.fills("position", closed=("scaling",))
class MRope(Rotary):
    """Turns queries and keys by the coordinates (t, y, x) of their tokens. No parameters.

    Positions (T,) or (B, T) are text; (B or 1, T, 3) are coordinates. transformers' `position_ids` (3, B, T) become
    that by `.movedim(0, -1)`. A picture stands where the text before it ends, and the text behind it one beyond its
    largest coordinate, so a stream behind pictures must be told its positions.

    Args:
        mrope_section: how many pairs belong to t, y and x, in this order; transformers' name. None = in the proportion
            of Qwen2-VL's, (16, 24, 24) of 64.
        order: of the pairs: "chunks" (Qwen2-VL, Qwen2.5-VL), "interleaved" (Qwen3-VL) or "alternating" (Ernie 4.5 VL,
            whose own list is (y, x, t), with `interleaved=True`).
        head_dim, base, scaling, interleaved, partial_rotary_factor: as of `Rotary`.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        mrope_section: tuple[int, ...] | None = None,
        order: Literal["chunks", "interleaved", "alternating"] = "chunks",
        base: float = 1000000.0,
        scaling: Scaling | None = None,
        interleaved: bool = False,
        partial_rotary_factor: float = 1.0,
    ) -> None:
        super().__init__(
            head_dim,
            base=base,
            scaling=scaling,
            interleaved=interleaved,
            partial_rotary_factor=partial_rotary_factor,
        )
        choice(self, ("chunks", "interleaved", "alternating"), order=order)
        pairs = self.rotary_dim // 2
        side = 3 * pairs // 8
        section = (pairs - 2 * side, side, side) if mrope_section is None else tuple(mrope_section)
        for size in section:
            whole(self, 0, mrope_section=size)
        if len(section) < 2 or sum(section) != pairs:
            refuse(self, "mrope_section", "doesn't deal out the pairs", section, f"numbers with the sum {pairs}")
        self.axis = axis_of_pairs(section, order)
        if (dealt := tuple(self.axis.count(a) for a in range(len(section)))) != section:
            refuse(self, "mrope_section", "can't be interleaved", section, f"a longer first section, as of {dealt}")
        self.mrope_section, self.order, self.axes = section, order, len(section)

    @checked(D="head_dim", A="axes")
    def rotate(
        self,
        z: Float[Tensor, "B H T D"],
        positions: Int[Tensor, " T"] | Int[Tensor, "B T"] | Int[Tensor, "#B T A"] | Float[Tensor, "#B T A"],
    ) -> Float[Tensor, "B H T D"]:
        return self._turned(z, positions)

    def angles(self, positions: Tensor, w: Float[Tensor, " half"]) -> Float[Tensor, "*b T half"]:
        if positions.dim() < 3:
            return angles(positions, w)
        return positions.to(w.dtype)[..., torch.tensor(self.axis, device=w.device)] * w

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mrope_section={self.mrope_section}, order={self.order!r}"
