"""What a mask looks like: queries down, keys across, in the terminal or as an SVG.

Short sequences are drawn entry by entry. Longer ones are pooled: a cell's shade is its density, taken from at
most SAMPLES positions a side and corrected by what the mask is sure of (empty, not empty, full).
"""

import textwrap
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.masks.verdict import Tiles

if TYPE_CHECKING:
    from regard.masks.algebra import Mask

SAMPLES = 48
SHADES = "·░▒▓█"
STYLE = (
    ".page{fill:#fff}.off{fill:#e8ebf0}.on{fill:#1d5fd1}.ink{fill:#33383f}.grid{stroke:#fff}"
    "@media (prefers-color-scheme:dark){.page{fill:#14171c}.off{fill:#262b33}.on{fill:#7db0ff}"
    ".ink{fill:#c9d0da}.grid{stroke:#14171c}}"
)


def text(mask: "Mask", T: int, S: int, b: int, h: int) -> str:
    """At most 100 columns wide; rows are labelled with the query position i."""
    density, (bq, bk) = _cells(mask, T, S, b, h, 48, 90)
    rows = ["".join(SHADES[_shade(x)] for x in row) for row in density.tolist()]
    if bk == 1 and 2 * S <= 90:  # terminal cells are twice as high as wide
        rows = [row.replace("·", "· ").replace("█", "██").rstrip() for row in rows]
    labels = [str(S - T + r * bq) for r in range(len(rows))]
    margin = max((len(label) for label in labels), default=0)
    title = _title(mask, T, S, b, h, bq, bk)
    lines = [title[n : n + 100] for n in range(0, len(title), 100)]
    return "\n".join(lines + [f"{label:>{margin}} {row}" for label, row in zip(labels, rows)])


def svg(mask: "Mask", T: int, S: int, b: int, h: int) -> str:
    """Rectangles, lines and text only. Colours follow the reader's light or dark setting."""
    density, (bq, bk) = _cells(mask, T, S, b, h, 64, 64)
    rows, cols = density.shape
    size, left, top = max(6, min(18, 512 // max(1, rows, cols))), 52, 34
    right, bottom = left + cols * size, top + rows * size
    title = _title(mask, T, S, b, h, bq, bk)
    width, height = max(right, left + 7 * min(len(title), 90)) + 16, bottom + 26
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="ui-monospace, monospace" font-size="11">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<rect class="page" width="{width}" height="{height}" rx="6"/>',
        f'<text class="ink" x="{left}" y="20">{escape(textwrap.shorten(title, 90, placeholder=" …"))}</text>',
        f'<rect class="off" x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"/>',
    ]
    for r, row in enumerate(density.tolist()):
        y = top + r * size
        if r % (-(-14 // size)) == 0:
            place = f'x="{left - 6}" y="{y + size / 2 + 4:g}" text-anchor="end"'
            out.append(f'<text class="ink" {place}>{S - T + r * bq}</text>')
        c = 0
        for value, run in groupby(row):
            length = len(list(run))
            if value > 0:
                shade = "" if value == 1 else f' fill-opacity="{0.25 + 0.65 * value:.3g}"'
                place = f'x="{left + c * size}" y="{y}" width="{length * size}" height="{size}"'
                out.append(f'<rect class="on" {place}{shade}/>')
            c += length
    if size >= 8:
        across = "".join(f"M{left} {top + r * size}H{right}" for r in range(1, rows))
        down = "".join(f"M{left + c * size} {top}V{bottom}" for c in range(1, cols))
        out.append(f'<path class="grid" d="{across}{down}"/>')
    out.append(f'<text class="ink" x="{left}" y="{height - 9}">keys across, queries down (positions i)</text></svg>')
    return "\n".join(out)


def _title(mask: "Mask", T: int, S: int, b: int, h: int, bq: int, bk: int) -> str:
    parts = [f"T={T}" if T == S else f"T={T} S={S}"]
    parts += [f"batch {b} of {mask.batch}"] * (mask.batch > 1) + [f"head {h} of {mask.heads}"] * (mask.heads > 1)
    parts += [f"a cell = {bq} x {bk}"] * (bq * bk > 1)
    return f"{mask!r}  {', '.join(parts)}"


def _shade(density: float) -> int:
    """0 only for empty and 4 only for full cells."""
    return 0 if density == 0 else 4 if density == 1 else 1 + min(2, int(3 * density))


def _cells(
    mask: "Mask", T: int, S: int, b: int, h: int, rows: int, cols: int
) -> tuple[Float[Tensor, "rows cols"], tuple[int, int]]:
    """The density of each cell of the picture, and how many queries and keys a cell stands for."""
    for what, index, end in (("b", b, mask.batch), ("h", h, mask.heads)):
        if not 0 <= index < end:
            raise ValueError(f"picture: {what} must lie in 0..{end - 1} (got {index})")
    bq, bk = max(1, -(-T // rows)), max(1, -(-S // cols))
    (i, i_lo, i_hi), (j, j_lo, j_hi) = _axis(S - T, S, bq), _axis(0, S, bk)
    density = torch.zeros(len(i), len(j), device="cpu")
    if density.numel() == 0:
        return density, (bq, bk)
    batch, head = torch.tensor(b, device="cpu"), torch.tensor(h, device="cpu")
    for r, positions in enumerate(i):
        allowed = mask(batch, head, positions[:, None, None], j).broadcast_to(i.shape[1], *j.shape)
        density[r] = allowed.float().mean((0, 2))
    verdict = mask.judge(
        Tiles(*(x[None, None, :, None] for x in (i_lo, i_hi)), *(x[None, None, None] for x in (j_lo, j_hi)))
    )
    shape = (mask.batch, mask.heads, len(i), len(j))
    some, may, full = (x.broadcast_to(shape)[b, h] for x in (verdict.some, verdict.may, verdict.full))
    density = density.masked_fill(some & (density == 0), 0.01).masked_fill(~may, 0)
    return density.masked_fill(full, 1), (bq, bk)


def _axis(start: int, end: int, block: int) -> tuple[Int[Tensor, "n k"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Sampled positions within each block of start..end-1, and the block's first and last position."""
    low = torch.arange(start, end, block, device="cpu")
    high = (low + block).clamp(max=end) - 1
    samples = torch.arange(min(block, SAMPLES), device="cpu")
    if block > SAMPLES:
        # Uneven steps, so that regular patterns don't alias.
        samples = ((samples + samples * 0.618 % 1) * (block / SAMPLES)).long()
    return low[:, None] + samples % (high - low + 1)[:, None], low, high
