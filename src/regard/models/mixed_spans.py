"""Mixed attention spans: which layers of a model see all keys and which a span, in the words of `regard.spec`."""

from collections.abc import Sequence
from typing import Literal, get_args

from regard.checks import choice, refuse, whole

Form = Literal["block", "window"]


def mixed_spans(
    depth: int,
    *,
    full: int | Sequence[int] | None = None,
    span: int = 1024,
    form: Form = "block",
    joined: str = "",
) -> str:
    """MASFormer (Zhang et al. 2023, https://arxiv.org/abs/2310.12442): the mechanisms of so many layers, as text.

        mixed_spans(8, full=2, span=64)      'softmax*2+block_span(span=64)*6'

    `LMConfig`, `regard.models.layers`, `regard compare` and `regard.swap` read it. Weights are those of a model whose
    layers are all full, so that its state dict loads whatever the placement: keep the text with it.

    Args:
        full: how many of the lowest layers see all keys, or which layers do. Default: the lowest quarter, at least one.
        span: of the other layers: tokens of a block (`block_span`), or of a window.
        form: "block" or "window".
        joined: what every layer has besides, such as "rotary".

    Raises:
        ValueError, TypeError: layers that are not there, or are named twice, and what is no size.
    """
    whole("mixed_spans", depth=depth, span=span)
    choice("mixed_spans", get_args(Form), form=form)
    full = max(1, depth // 4) if full is None else full
    if isinstance(full, bool) or not isinstance(full, int | Sequence) or isinstance(full, str):
        refuse("mixed_spans", "full", "has the wrong type", repr(full), "an int or a sequence of ints", error=TypeError)
    if isinstance(full, int):
        whole("mixed_spans", 0, most=depth, full=full)
        full = range(full)
    for layer in full:
        whole("mixed_spans", 0, most=depth - 1, full=layer)
    if len(set(full)) < len(full):
        refuse("mixed_spans", "full", "names a layer twice", list(full), "each once")
    short = f"block_span(span={span})" if form == "block" else f"window(window={span})"
    names = ["softmax" if n in full else short for n in range(depth)]
    if joined:
        names = [f"({name}+{joined})" if name != "softmax" else f"({joined})" for name in names]
    runs: list[tuple[str, int]] = []
    for name in names:
        if runs and runs[-1][0] == name:
            runs[-1] = (name, runs[-1][1] + 1)
        else:
            runs.append((name, 1))
    return "+".join(f"{name}*{times}" for name, times in runs)
