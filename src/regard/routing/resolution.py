"""Rising resolution: the first steps of denoising on fewer tokens, and what makes up for them against the text."""

import math
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from regard.checks import number, refuse, whole
from regard.stages import Mix, Rows


def box_of(who: object, sizes: Any) -> tuple[int, int, int]:
    """(T, Y, X), or a refusal."""
    if not isinstance(sizes, tuple | list) or len(sizes) != 3:
        refuse(who, "sizes", "are not those of a video", sizes, "(T, Y, X)")
    T, Y, X = sizes
    whole(who, **{"sizes' T": T, "sizes' Y": Y, "sizes' X": X})
    return T, Y, X


class TextBias(Mix):
    """Image queries weigh text keys 2**bias times as much. No parameters.

    Args:
        start: the first token of text; those before are the image's.
        bias: added to scores in base 2, so `bias` ln 2 in natural units.
    """

    sees = "pair"

    def __init__(self, start: int, bias: float) -> None:
        super().__init__()
        whole(self, 0, start=start)
        number(self, bias=bias)
        self.start, self.bias = start, bias

    def pair(self, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + ((i < self.start) & (j >= self.start)).to(score.dtype) * (self.bias * math.log(2))

    def forward(self, z: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "B H t s"]:
        return self.pair(z, rows.i, rows.i, rows.i[:, None], rows.j)

    def extra_repr(self) -> str:
        return f"start={self.start}, bias={self.bias}"


def text_amplifier(tokens: int, at_last: int, *, scale: float = 1.0) -> float:
    """The text_bias of a stage with so many image tokens, of `at_last` at the last resolution.

    Raises:
        ValueError: if there are none.
    """
    whole("text_amplifier", tokens=tokens, at_last=at_last)
    number("text_amplifier", scale=scale)
    return math.log2(math.sqrt(at_last / tokens)) * scale


class Stage(NamedTuple):
    """Some steps of denoising at one resolution: `sizes`, `drop` and `text_bias` are options of `jenga`."""

    steps: range
    sizes: tuple[int, int, int]
    drop: float
    text_bias: float


def progressive(
    sizes: tuple[int, int, int],
    steps: int,
    *,
    resolutions: tuple[float, ...] = (0.75, 1.0),
    until: tuple[float, ...] = (0.5, 1.0),
    drops: tuple[float, ...] = (0.75, 0.85),
    scale: float = 1.0,
) -> tuple[Stage, ...]:
    """The stages of `steps` steps of denoising, with rows and columns scaled by `resolutions`; time never is.

    Between stages a sampler takes its estimate of the clean latents, resizes it (trilinearly, as the authors do), and
    adds fresh noise of the next step's level.

    Args:
        sizes: (T, Y, X) at resolution 1, in tokens.
        until: the share of steps after which a stage ends; the step there is still its own, as in the authors' code.
        scale: of the text's bias, which the first stage alone has.

    Raises:
        ValueError: if the stages differ in number, don't follow one another until the end, or leave no tokens.
    """
    T, Y, X = box_of("progressive", sizes)
    whole("progressive", steps=steps)
    for name, given in (("resolutions", resolutions), ("until", until), ("drops", drops)):
        if len(given) != len(resolutions) or not given:
            refuse("progressive", name, "are for another number of stages", given, f"{len(resolutions)}, one or more")
        number("progressive", least=0, most=1, **{f"{name}[{n}]": each for n, each in enumerate(given)})
    ends = [min(int(steps * share) + 1, steps) for share in until]
    if ends[-1] != steps or any(end <= begin for begin, end in zip([0, *ends], ends, strict=False)):
        refuse("progressive", "until", f"leaves stages or steps of {steps} out", until, "shares that rise to 1")
    boxes = [box_of("progressive", (T, int(Y * r), int(X * r))) for r in resolutions]
    first = text_amplifier(math.prod(boxes[0]), math.prod(boxes[-1]), scale=scale)
    return tuple(
        Stage(range(begin, end), box, drop, 0.0 if n else first)
        for n, (begin, end, box, drop) in enumerate(zip([0, *ends], ends, boxes, drops, strict=False))
    )
