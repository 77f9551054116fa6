"""L0, both directions of `supports`: what is claimed works, and what isn't claimed is refused."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from regard import masks
from regard.laws.agreement import close, does_not_apply, hold, refused, says
from regard.laws.registry import LAYERS, law
from regard.laws.subject import Subject, takes


def lacks(feature: str) -> Callable[[Subject], str]:
    return lambda s: f"it claims to support {feature}" if feature in s.supports else ""


def unbuilt(feature: str) -> Callable[[Subject], str]:
    """As `lacks`, for what shows when it is built, which only the catalogue says how to do."""
    return lambda s: "it is not in the catalogue" if s.foreign else lacks(feature)(s)


def turned_down(s: Subject, argument: str, *words: str, what: str) -> AbstractContextManager[None]:
    """A mechanism of the catalogue says why, or has no such argument; anything else just may not take it."""
    if s.foreign:
        return refused((TypeError, ValueError), what=what)
    return refused(ValueError if takes(s.build(), argument) else TypeError, *words, what=what)


@law("L0")
def claims_work(s: Subject) -> None:
    """What is claimed works: it runs, keeps its shape, and makes a difference."""
    hold(s.supports & {"causal", "bidirectional"}, "it claims neither 'causal' nor 'bidirectional'")

    def shaped(out: Tensor, what: str) -> None:
        hold(out.shape == x.shape, f"{what}: shape {tuple(out.shape)}, expected {tuple(x.shape)}")

    x, T = s.tokens(), s.length
    for causal in s.causalities:
        module = s.build(causal=causal)
        plain = module(x)
        shaped(plain, f"causal={causal}")
        if "cross" in s.supports and causal in s.crossings:
            shaped(module(x, s.context()), "with a context")
        if "padding" in s.supports:
            keep = (torch.arange(T) < T - 2).expand(s.batch, T)
            hidden = module(x, mask=masks.padding(keep))
            hold(not torch.allclose(hidden[:, -1], plain[:, -1]), "the padding mask changes nothing")
        if "mask" in s.supports:
            allowed = torch.eye(T, dtype=torch.bool)[None, None]
            hold(not torch.allclose(module(x, mask=allowed)[:, -1], plain[:, -1]), "the mask changes nothing")
    if "gqa" in s.supports:
        shaped(s.build(**s.groups)(x), "with fewer key heads")
    if "streaming" in s.supports:
        hold("causal" in s.supports, "only what is causal can stream")
        hold(hasattr(s.build(causal=True), "step"), "it claims to stream, and has no step")


@law("L0", where=unbuilt("causal"))
def not_causal(s: Subject) -> None:
    """What isn't claimed is refused: to be causal."""
    with refused(ValueError, "causal", what="causal=True"):
        s.build(causal=True)


@law("L0", where=unbuilt("bidirectional"))
def not_bidirectional(s: Subject) -> None:
    """What isn't claimed is refused: not to be causal."""
    with refused(ValueError, "bidirectional", what="causal=False"):
        s.build(causal=False)


@law("L0", where=unbuilt("gqa"))
def not_grouped(s: Subject) -> None:
    """What isn't claimed is refused: fewer key heads than query heads."""
    with refused(ValueError, "gqa", what="num_kv_heads"):
        s.build(num_kv_heads=2)


@law("L0", where=unbuilt("dropout"))
def no_dropout(s: Subject) -> None:
    """What isn't claimed is refused: dropout."""
    with refused(ValueError, "dropout", what="dropout"):
        s.build(dropout=0.1)


@law("L0", where=lacks("cross"))
def not_across(s: Subject) -> None:
    """What isn't claimed is refused: a context."""
    module = s.build()
    with turned_down(s, "context", "cross", "context", "argument", what="a context"):
        module(s.tokens(), s.context())


@law("L0", where=lacks("padding"))
def no_padding(s: Subject) -> None:
    """What isn't claimed is refused: a padding mask."""
    module = s.build()
    with turned_down(s, "mask", "mask", "padding", what="a padding mask"):
        module(s.tokens(), mask=masks.padding(torch.ones(s.batch, s.length, dtype=torch.bool)))


@law("L0", where=lacks("mask"))
def no_mask(s: Subject) -> None:
    """What isn't claimed is refused: a mask, as a tensor or as a value that hides more than padding."""
    module = s.build()
    for mask in (torch.ones(1, 1, s.length, s.length, dtype=torch.bool).tril(), masks.window(3)):
        with turned_down(s, "mask", "mask", what=f"a mask as {type(mask).__name__}"):
            module(s.tokens(), mask=mask)


@law("L0", where=lacks("streaming"))
def no_stream(s: Subject) -> None:
    """What isn't claimed is refused: to stream."""
    module = s.build()
    if not hasattr(module, "init_state"):
        does_not_apply("it has no init_state")
    kinds, words = ((ValueError,), ("streaming",)) if not s.foreign else ((TypeError, ValueError), ())
    with refused(kinds, *words, what="init_state"):
        module.init_state(s.batch, s.length)


@law("L0", needs="causal streaming bidirectional", pipeline=True)
def only_causal_layers_stream(s: Subject) -> None:
    """What isn't claimed is refused: to stream where every token sees every other."""
    module = s.build(causal=False)
    with refused(ValueError, "causal", what="init_state of a layer that is not causal"):
        module.init_state(s.batch, s.length)


@law("L0", protocols=LAYERS)
def output_of_the_protocol(s: Subject) -> None:
    """The output is a tensor of the input's dtype and of the protocol's shape."""
    module, given = s.build(), s.inputs()
    out = module(*given)
    hold(isinstance(out, Tensor), f"the output is a {type(out).__name__}, expected a tensor")
    hold(out.dtype == given[0].dtype, f"the output is {out.dtype} for inputs of {given[0].dtype}")
    want: tuple[int, ...] = tuple(given[0].shape)
    if s.protocol == "Loss":
        want = ()
    elif s.protocol == "Pooler":
        want = (s.batch, s.dim)
    elif s.protocol == "Pointer":
        want = (*given[0].shape[:2], given[1].shape[1])
    hold(out.shape == want, f"the output has shape {tuple(out.shape)}, expected {want}")
    if s.protocol == "Pointer":
        close(out.exp().sum(-1), torch.ones(want[:2], dtype=out.dtype), "sum of probabilities")


@law(
    "L0",
    protocols=LAYERS,
    where=lambda s: "it is a Loss" if s.protocol == "Loss" else "" if not s.foreign else "not in the catalogue",
)
def wrong_inputs_are_refused(s: Subject) -> None:
    """Tokens that are too narrow, or without a batch, raise a ValueError that says the shape it got."""
    module, (x, *rest) = s.build(), s.inputs()
    narrow = x[:, :-1] if s.protocol == "FeatureMixer" else x[..., :-1]
    for wrong in (narrow, x[0]):
        with refused(ValueError, "expected", "must be", what=f"an input of shape {tuple(wrong.shape)}"):
            try:
                module(wrong, *rest)
            except ValueError as error:
                says(error, tuple(wrong.shape))
                raise
