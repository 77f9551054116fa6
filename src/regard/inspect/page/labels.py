"""What the page calls tokens: text that is safe to draw, or the place in a picture."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F

from regard.inspect.layers import LayerTrace
from regard.inspect.traced import Traced
from regard.terminal import clean

LONGEST = 120
"""Characters of a token that the page keeps."""
WIDEST = 384
"""Pixels of a picture's longer side."""

LOST = (255, 0, 255)
"""What pixels are drawn in that hold NaN or infinity."""

Lists = dict[str, list[list[str]]]
"""Token lists by name, each with one list for a batch row."""


def label(token: str) -> str:
    """A token without control characters; breaks and tabs become signs."""
    for sign, shown in (("\r\n", "↵"), ("\n", "↵"), ("\r", "↵"), ("\t", "⇥")):
        token = token.replace(sign, shown)
    shown = clean(token[: 4 * LONGEST]) or ("�" if token else "")
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"


def lists(trace: Traced) -> Lists:
    """All token lists of a trace: of its text, of its decoder, of its picture's patches."""
    found = {"text": trace.tokens, "decoder": trace.decoder_tokens}
    named = {name: [[label(t) for t in row] for row in rows] for name, rows in found.items() if rows}
    if trace.grid is not None and trace.layers:
        first = ["[CLS]", *(f"[extra {n}]" for n in range(1, trace.extra_tokens))][: trace.extra_tokens]
        patches = [f"row {y + 1}, column {x + 1}" for y in range(trace.grid[0]) for x in range(trace.grid[1])]
        batch = len(trace.images) if trace.images is not None else max(layer.shape[0] for layer in trace.layers)
        named["picture"] = [first + patches] * batch
    return named


def named(trace: Traced, layer: LayerTrace, found: Lists) -> tuple[str | None, str | None]:
    """Which list holds the layer's queries and which its keys; None where positions have to do."""
    _, _, T, S = layer.shape
    own = "decoder" if layer.side == "decoder" and "decoder" in found else "text"
    orders = [own, "picture"], ["text" if layer.kind == "cross" else own, "picture"]
    if layer.side == "vision":
        orders = ["picture"], ["picture"]

    def fits(order: Sequence[str], length: int) -> str | None:
        return next((n for n in order if n in found and all(len(row) == length for row in found[n])), None)

    return fits(orders[0], T), fits(orders[1], S)


def picture(image: Float[Tensor, "3 Y X"]) -> Integer[Tensor, "Y X 3"]:
    """The picture in 0..255, its own darkest and brightest values at the ends; at most WIDEST pixels a side.

    Pixels that are no numbers are magenta.
    """
    scale = WIDEST / max(image.shape[-2:])
    image = image.double()
    if scale < 1:
        image = F.interpolate(image[None], scale_factor=scale, mode="area")[0]
    lost = ~image.isfinite()
    known = image[~lost] if not lost.all() else image.new_zeros(1)
    levels = (image - known.min()) / (known.max() - known.min()).clamp_min(1e-12) * 255
    levels = torch.where(lost.any(0), levels.new_tensor(LOST)[:, None, None], levels)
    return levels.round().byte().permute(1, 2, 0).contiguous()
