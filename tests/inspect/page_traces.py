"""Small traces for tests of the page, made of random queries and keys."""

import torch

from regard.inspect.layers import LayerTrace
from regard.inspect.trace import Trace

WORDS = ("[CLS]", "the", "cat", "sat", "on", "the", "mat", "and", "slept", "all", "day", "[SEP]")
HOSTILE = (
    "<script>window.hacked=1</script>",
    '"><img src=x onerror="window.hacked=1">',
    "</script><script>window.hacked=1</script>",
    "javascript:alert(1)",
    "{{7*7}}",
    "a\u2028b\u2029c",
    "\u202eright to left",
    "\x00\x1b[31mred",
    "=cmd()",
    "<!--<script>",
    "]]>",
    "x" * 5000,
)


def layer(
    index: int, *, B: int = 2, H: int = 3, T: int = 12, S: int | None = None, D: int = 8, G: int | None = None, **more
) -> LayerTrace:
    """One layer; causal with `causal=True`. Other keywords are fields of LayerTrace."""
    S, G = S or T, G or H
    if more.pop("causal", False):
        more["mask"] = torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None]
    given = {"name": f"layers.{index}", "kind": "self", "side": "", "scale": D**-0.5} | more
    tensors = {"q": torch.randn(B, H, T, D) * 2, "k": torch.randn(B, G, S, D), "v": torch.randn(B, G, S, D)}
    return LayerTrace(index=index, **tensors | given)


def text(*, L: int = 2, B: int = 2, words: tuple[str, ...] = WORDS, **more) -> Trace:
    """A stack that reads `words`, the batch rows the other way round each."""
    rows = tuple(words if row % 2 == 0 else words[::-1] for row in range(B))
    layers = tuple(layer(n, B=B, T=len(words), **more) for n in range(L))
    return Trace(layers, tokens=rows, model="TestModel")


def translation() -> Trace:
    """An encoder of 7 tokens and a decoder of 5."""
    parts = [layer(n, T=7, side="encoder") for n in range(2)]
    for n in range(2):
        parts += [layer(n, T=5, side="decoder", causal=True), layer(n, T=5, S=7, side="decoder", kind="cross")]
    read, written = tuple(f"read{n}" for n in range(7)), tuple(f"written{n}" for n in range(5))
    return Trace(tuple(parts), (read, read), (written, written), model="Translator")


def picture() -> Trace:
    """A stack over 3 x 4 patches and a class token."""
    layers = tuple(layer(n, T=13) for n in range(2))
    return Trace(layers, images=torch.rand(2, 3, 24, 32), grid=(3, 4), extra_tokens=1, model="Seer")
