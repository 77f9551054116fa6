"""Axial rotary positions: on a grid, each axis turns channels of its own."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.cards import Card, Paper
from regard.checks import checked, choice, number, refuse, whole
from regard.positions._shared import frequencies
from regard.positions.rotary import CARD as ROTARY
from regard.positions.rotary import rotate
from regard.stages import Position

CARD = Card(
    "rotary_axial",
    equation="""rotary for tokens at (x_1, .., x_A): of A n pairs, pair n c + a turns by the angle x_c w_a
w_a = base^(-a/n), a = 0 .. n - 1 ("own"),   or pair n c + a has base^(-(A a + c)/(A n)) ("dealt");   n = D // (2 A)""",
    papers=(
        Paper(
            "Rotary Position Embedding for Vision Transformer",
            "Heo, Park, Han, Yun",
            2024,
            "2403.13298",
            "abstract; official code, RoPE-Axial",
        ),
        Paper(
            "Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution",
            "Wang et al.",
            2024,
            "2409.12191",
            "not its own text, but the vision tower's code in transformers",
        ),
        Paper("Pixtral 12B", "Agrawal et al.", 2024, "2410.07073", "not its own text, but its code in transformers"),
        Paper("DINOv3", "Siméoni et al.", 2025, "2508.10104", "not its own text, but its code in transformers"),
    ),
    traits=ROTARY.traits - {"shift_invariant"},
    cost=ROTARY.cost,
    claim="Scores depend on the distance along each axis only: "
    "tests/positions/test_axial.py::test_scores_depend_on_the_distance_along_each_axis.",
    differs=("Pairs stand D/2 apart by default, as in Qwen2-VL; Heo et al. have neighbours.",),
    verified="third-party",
    tasks=("digits",),
    example={"sizes": (3, 2)},
    tries={"pairs": {"pairs": "neighbours", "head_dim": 8}},
    defaults={
        "sizes": "ours",
        "prefix": "ours",
        "base": "code, Qwen2-VL",
        "frequencies": "code, Qwen2-VL",
        "pairs": "code, Qwen2-VL",
    },
)


def coordinates(positions: Int[Tensor, "*b T"], sizes: tuple[int, ...], prefix: int = 0) -> Int[Tensor, "*b T A"]:
    """Where the tokens of a grid stand, row by row; the first `prefix` tokens stand at 0, where nothing turns.

    The first of the sizes bounds nothing: what comes behind the grid goes on along the first axis.
    """
    place, found = (positions - prefix).clamp(min=0), []
    for size in sizes[:0:-1]:
        found.append(place % size)
        place = place // size
    return torch.stack((place, *found[::-1]), dim=-1)


def grid(*sizes: int, prefix: int = 0, device: torch.device | str | None = None) -> Int[Tensor, "1 N A"]:
    """Coordinates of a whole grid, (1, prefix + product of sizes, number of sizes), last axis fastest.

    Args:
        sizes: as (Y, X) of an image or (T, Y, X) of a video.
        prefix: so many tokens before it that don't turn, as class tokens; they stand at 0.
    """
    if not sizes:
        refuse("grid", "sizes", "are none", (), "at least one")
    for size in sizes:
        whole("grid", sizes=size)
    whole("grid", 0, prefix=prefix)
    return coordinates(torch.arange(prefix + math.prod(sizes), device=device), sizes, prefix)[None]


def centres(
    *sizes: int, prefix: int = 0, span: float = 2 * math.pi, device: torch.device | str | None = None
) -> Float[Tensor, "1 N A"]:
    """Where the centres of a grid's cells stand if every axis goes from -span to span, whatever its size: DINOv3's.

    Args:
        sizes, prefix: as of `grid`; the tokens of the prefix stand at 0, which is the middle.
        span: half the length of an axis, in radians of the fastest pair.
    """
    number("centres", above=0, span=span)
    cells = grid(*sizes, device=device).float()
    found = span * ((2 * cells + 1) / cells.new_tensor(sizes) - 1)
    return torch.cat((found.new_zeros(1, prefix, len(sizes)), found), dim=1)


@CARD.fills("position")
class AxialRotary(Position):
    """Turns queries and keys by the coordinates of their tokens. No parameters.

    Positions (T,) or (B, T) count the tokens of a grid row by row; (B or 1, T, axes) are coordinates, whole or not,
    from `grid`, `centres` or elsewhere. Channels beyond the last whole pair of an axis don't turn.

    Args:
        head_dim: D, at least 2 for each axis.
        sizes: of the grid, as (Y, X) or (T, Y, X); there are as many axes. Only tells where counted tokens stand, and
            the first size isn't needed for that: a video may go on.
        prefix: how many counted tokens stand before the grid and don't turn.
        base: of the geometric w_a. Qwen2-VL, Pixtral and SAM 2 have 10000, DINOv3 and Heo et al. 100.
        frequencies: "own", every axis has the whole row; "dealt", the axes take turns at one longer row (Pixtral).
        pairs: which channels turn together: "half", half of those that turn apart (Qwen2-VL, Pixtral, DINOv3); "axis",
            half of an axis's own apart (Gemma 4's images); "neighbours" (SAM 2, Llama 4's images, EVA-02, Heo et al.).
    """

    def __init__(
        self,
        head_dim: int,
        *,
        sizes: tuple[int, ...] = (16, 16),
        prefix: int = 0,
        base: float = 10000.0,
        frequencies: Literal["own", "dealt"] = "own",
        pairs: Literal["half", "axis", "neighbours"] = "half",
    ) -> None:
        super().__init__()
        self.sizes = checked_sizes(self, sizes)
        self.axes = len(self.sizes)
        whole(self, 2 * self.axes, head_dim=head_dim)
        whole(self, 0, prefix=prefix)
        number(self, above=1, base=base)
        choice(self, ("own", "dealt"), frequencies=frequencies)
        choice(self, ("half", "axis", "neighbours"), pairs=pairs)
        self.head_dim, self.prefix, self.base = head_dim, prefix, base
        self.frequencies, self.pairs = frequencies, pairs
        self.pairs_per_axis = head_dim // (2 * self.axes)

    @checked(D="head_dim", A="axes")
    def rotate(
        self,
        z: Float[Tensor, "B H T D"],
        positions: Int[Tensor, " T"] | Int[Tensor, "B T"] | Int[Tensor, "#B T A"] | Float[Tensor, "#B T A"],
    ) -> Float[Tensor, "B H T D"]:
        if positions.numel() == 0:
            return z
        n, A = self.pairs_per_axis, self.axes
        x = positions if positions.dim() == 3 else coordinates(positions, self.sizes, self.prefix)
        if self.frequencies == "own":
            w = frequencies(2 * n, self.base, z.device)
        else:
            w = frequencies(2 * n * A, self.base, z.device).unflatten(0, (n, A)).T
        angle = (x.to(w.dtype).unsqueeze(-1) * w).flatten(-2)
        return rotate(z, angle, blocks={"half": 1, "axis": A, "neighbours": n * A}[self.pairs])

    def extra_repr(self) -> str:
        grid = f"sizes={self.sizes}, prefix={self.prefix}"
        return f"{self.head_dim}, {grid}, base={self.base:g}, frequencies={self.frequencies!r}, pairs={self.pairs!r}"


def checked_sizes(who: object, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """A grid's sizes, as a tuple of at least two."""
    if not isinstance(sizes, tuple | list) or len(sizes) < 2:
        refuse(who, "sizes", "are no grid", sizes, "two or more, as (Y, X) or (T, Y, X)")
    for size in sizes:
        whole(who, sizes=size)
    return tuple(sizes)
