"""Pictures for the pages of mechanisms: what a small random instance sees, as inline SVG.

Three kinds, whichever tells most: the mask; the weights of each head, measured by `regard.inspect.effective_weights`
where a mechanism is linear in its values; and else how much each output depends on each input, by gradients.
"""

from collections.abc import Iterator, Sequence
from html import escape

import torch
from torch import Tensor, nn

from regard import masks
from regard.cards import Card
from regard.cli.picture import BUILT, bias_picture, field
from regard.inspect.effective import effective_weights, reads
from regard.laws import Subject, of

LEVELS = 8
TOKENS = 16
ROUNDING = 1e-9
"""What is nearer to 0, of at most 1, is a rounding error of float64."""
DIRECTIONS = 6
"""Random combinations of an output's features whose gradients are looked at."""


def pictures(card: Card) -> str:
    """All pictures of a mechanism as HTML; '' for what is no module."""
    if card.is_function or card.protocol not in BUILT or card.protocol == "Loss":
        return ""
    s = of(card.name)
    with torch.random.fork_rng(devices=[]):
        module = s.build()
        return "\n".join(figure(panels, caption) for panels, caption in _views(s, module))


def bias(card: Card) -> list[str]:
    """What a position adds by distance, in lines of text as `regard show` has them."""
    if card.is_function or not card.is_part:
        return []
    s = of(card.name)
    return bias_picture(s.build(noise=0.0, dtype=torch.float32))


def _views(s: Subject, module: nn.Module) -> Iterator[tuple[dict[str, Tensor], str]]:
    """Named matrices and what they show."""
    here = "causal" if s.causalities and s.causalities[-1] else "not causal"
    seen = field(module)
    if seen is not None and s.protocol == "TokenMixer":
        allowed = seen.dense(24)[0, 0]
        if not any(torch.equal(allowed, plain.dense(24)[0, 0]) for plain in (masks.full(), masks.causal())):
            yield {"": allowed.double()}, f"Which of 24 keys (across) each query (down) may see; {here}."
    weights = _weights(s, module)
    if weights is not None:
        panels = {f"head {head}": matrix for head, matrix in enumerate(weights)}
        yield panels, f"Weights of {weights.shape[-1]} random tokens: queries down, keys across; {here}."
    else:
        yield _dependence(s, module, here)


def _weights(s: Subject, module: nn.Module) -> Tensor | None:
    """(H, T, S) of one random sequence; None where no matrix a head tells what the mechanism does."""
    if s.protocol != "TokenMixer" or not reads(module):
        return None
    try:
        return effective_weights(module, 2 * s.tokens(1, TOKENS))[0]
    except ValueError:
        return None


def _dependence(s: Subject, module: nn.Module, here: str) -> tuple[dict[str, Tensor], str]:
    """How much outputs change with inputs: the root of the mean square of gradients."""
    given = s.inputs()
    source = 1 if s.protocol in ("CrossMixer", "Pointer") else 0
    read = given[source].clone().requires_grad_()
    out = module(*given[:source], read, *given[source + 1 :])
    if s.protocol == "Pointer":
        words = "The output itself: how likely each of what it reads (across) is at each step (down)."
        return {"": out.detach()[0].exp()}, words
    if s.protocol == "FeatureMixer":
        if out.dim() == 3:  # along one axis
            out = out.unsqueeze(2)
        Y, X = out.shape[-2:]
        places = {"corner": (0, 0), "edge": (0, X // 2), "middle": (Y // 2, X // 2)}
        found = {name: _gradient(out[0][..., y, x], read)[0].pow(2) for name, (y, x) in places.items()}
        panels = {name: g.reshape(-1, Y, X).mean(0).sqrt() for name, g in found.items()}
        return panels, f"How much the output at one place depends on each place of a map, {Y} x {X}, by gradients."
    what = {"GraphMixer": "node", "TokenMixer": "token", "Pooler": "token"}.get(s.protocol, "vector that it reads")
    words = f"How much each output (down) depends on each {what} (across), by gradients"
    words += f"; {here}." if s.protocol == "TokenMixer" else "."
    first = out if s.protocol == "GraphMixer" else out[:1] if s.protocol == "Pooler" else out[0]
    rows = [_gradient(row, read) for row in first]
    rows = rows if s.protocol == "GraphMixer" else [row[0] for row in rows]
    return {"": torch.stack([row.pow(2).mean(-1).sqrt() for row in rows])}, words


def _gradient(out: Tensor, read: Tensor) -> Tensor:
    """The root of the mean square gradient over random combinations of `out`."""
    draw = torch.Generator().manual_seed(4)
    total = torch.zeros_like(read)
    for _ in range(DIRECTIONS):
        direction = torch.randn(out.shape, generator=draw, dtype=out.dtype)
        total += torch.autograd.grad((out * direction).sum(), read, retain_graph=True)[0].pow(2)
    return (total / DIRECTIONS).sqrt()


# --- SVG ----------------------------------------------------------------------------------------------------


def figure(panels: dict[str, Tensor], caption: str) -> str:
    """Matrices side by side, all on one scale, and what they show."""
    most = max(float(matrix.abs().nan_to_num(0.0).amax()) for matrix in panels.values()) or 1.0
    drawn = ""
    for name, matrix in panels.items():
        label = f"<span>{escape(name)}</span>" if name else ""
        drawn += f'<div class="panel">{heat(matrix / most, f"{name} {caption}")}{label}</div>'
    signs = " Red is negative." if 'class="n' in drawn else ""
    kind = "panels one" if len(panels) == 1 else "panels"
    caption = f"<figcaption>{escape(caption)}{signs}</figcaption>"
    return f'<figure class="seen"><div class="{kind}">{drawn}</div>{caption}</figure>'


def heat(matrix: Tensor, title: str) -> str:
    """A matrix of numbers in -1 .. 1 as an SVG of squares, a path for each shade."""
    rows, columns = matrix.shape
    paths: dict[str, list[str]] = {}
    for r, row in enumerate(matrix.nan_to_num(0.0).tolist()):
        for kind, first, length in _runs(row):
            paths.setdefault(kind, []).append(f"M{first} {r}h{length}v1h-{length}z")
    shades = "".join(f'<path class="{kind}" d="{"".join(d)}"/>' for kind, d in sorted(paths.items()) if kind)
    return (
        f'<svg class="heat" viewBox="0 0 {columns} {rows}" style="aspect-ratio:{columns}/{rows}" role="img" '
        f'shape-rendering="crispEdges"><title>{escape(title.strip())}</title>'
        f'<rect class="off" width="{columns}" height="{rows}"/>{shades}</svg>'
    )


def _runs(row: Sequence[float]) -> Iterator[tuple[str, int, int]]:
    """(shade, first column, how many) for equal neighbours; '' for nothing at all."""
    start = 0
    kinds = [_shade(value) for value in row]
    for at in range(1, len(kinds) + 1):
        if at == len(kinds) or kinds[at] != kinds[start]:
            yield kinds[start], start, at - start
            start = at


def _shade(value: float) -> str:
    """'p1' .. 'p8' for more than nothing, 'n1' .. 'n8' for less: linear, and never '' for what is not 0."""
    if abs(value) < ROUNDING:
        return ""
    level = max(1, min(LEVELS, round(abs(value) * LEVELS)))
    return f"{'p' if value > 0 else 'n'}{level}"
