"""The page: one HTML document that needs nothing else, neither network nor files.

Everything that comes from a model or a user stands in data blocks that the browser does not read as markup, and the
scripts write it with textContent only.
"""

import html
import json
import secrets
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jaxtyping import Float
from torch import Tensor

from regard.checks import choice, refuse, whole
from regard.inspect.page.embedding import PLANES
from regard.inspect.page.labels import label
from regard.inspect.page.payload import payload
from regard.inspect.traced import Traced

LIMIT = 56_000_000
"""Bytes of text that the maps, queries and keys of a page may take, about: 12 layers of 12 heads on 512 tokens fit."""
FRAGMENT = 8_000_000
"""Likewise inside a notebook, which holds the page in its own file."""
SCRIPTS = (
    "base",
    "data",
    "draw",
    "model",
    "lines",
    "matrix",
    "head",
    "neuron",
    "plane",
    "text",
    "picture",
    "table",
    "main",
)


def render(
    trace: Traced,
    *,
    other: Traced | None = None,
    title: str = "",
    names: tuple[str, str] = ("before", "after"),
    maps: Mapping[str, Float[Tensor, "B T S"]] | None = None,
    planes: Sequence[str] = ("pca",),
    limit: int = LIMIT,
) -> str:
    """One self-contained interactive HTML document.

    Args:
        other: a second trace of the same inputs, shown beside the first, for instance after a swap.
        names: what the two are called where there are two.
        maps: further maps to paint on the text, by name, such as a gradient relevance; larger is more.
        planes: how queries and keys are laid into a plane: "pca", "tsne" (needs scikit-learn), "umap" (umap-learn).
        limit: bytes that maps, queries and keys may take, about. Where maps would take more, the page keeps the
            largest weights of each query, then fewer batch rows, then pools neighbouring tokens, and says so.

    Raises:
        ValueError: no layers, traces of different shapes, a plane that is not known, a map that fits no layer.
    """
    traces = {names[0]: trace} if other is None else {names[0]: trace, names[1]: other}
    if not trace.layers:
        refuse("render", "trace", "holds no layers", 0, "one at least")
    for layer in trace.layers:
        if min(layer.shape) < 1:
            wanted = "a batch row, a head, a query and a key at least"
            refuse("render", f"trace.layers: {layer.name}", "has nothing to show", tuple(layer.shape), wanted)
    if len(traces) < 1 + (other is not None):
        refuse("render", "names", "are the same for both traces", names, "two names")
    shapes = [[tuple(layer.shape) for layer in one.layers] for one in traces.values()]
    if shapes[0] != shapes[-1]:
        wanted = f"a trace of the same inputs and layers, {shapes[0][:3]}"
        refuse("render", "other", "has layers of other shapes (B, H, T, S) than trace", shapes[-1][:3], wanted)
    for n, plane in enumerate(planes):
        choice("render", PLANES, **{f"planes[{n}]": plane})
    whole("render", limit=limit)
    facts: list[dict[str, Any]] = []
    chunks: dict[str, str] = {}
    for key, (name, one) in zip("ab", traces.items()):
        kept, parts = payload(one, key, maps=maps or {}, planes=planes, limit=limit // len(traces))
        facts.append(kept | {"name": label(name)})
        chunks |= parts
    shown = label(title) or f"What {label(trace.model) or 'the model'} attends to"
    nonce = secrets.token_urlsafe(18)
    policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data:"
    scripts = "".join(f'<script nonce="{nonce}">\n{_file(f"js/{name}.js")}</script>\n' for name in SCRIPTS)
    blocks = "".join(f'<script type="text/plain" id="{name}">{text}</script>\n' for name, text in chunks.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{html.escape(shown)}</title>\n'
        f"<style>\n{_file('page.css')}</style>\n</head>\n<body>\n{_file('page.html')}"
        f'<script type="application/json" id="facts">{_json({"title": shown, "traces": facts})}</script>\n'
        f"{blocks}{scripts}</body>\n</html>\n"
    )


def fragment(trace: Traced, *, height: int = 820, limit: int = FRAGMENT) -> str:
    """The page inside a frame of its own, for a notebook's `_repr_html_`: nothing in it meets the notebook's page."""
    page = html.escape(render(trace, limit=limit), quote=True)
    return (
        f'<iframe sandbox="allow-scripts" title="Attention" srcdoc="{page}" '
        f'style="width: 100%; height: {height}px; border: 0"></iframe>'
    )


def _json(facts: object) -> str:
    """ASCII-only JSON without '<' or '&', which can neither end its block nor hold a line separator."""
    text = json.dumps(facts, allow_nan=False, separators=(",", ":"))
    for sign, escaped in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(sign, escaped)
    return text


def _file(name: str) -> str:
    return (resources.files("regard.inspect.page") / name).read_text("utf-8")
