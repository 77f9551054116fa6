"""Attention weights of any mechanism that is linear in its values: softmax, sparse, linear and recurrent ones alike.

    out = W(q, k) v  =>  column j of W is the output for values that are 1 at key j and 0 elsewhere

One call of the mechanism measures as many keys as its values have features, for a key may answer in each. It holds
for W that is the same for every feature; whether the mechanism is of that kind is tested before and afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.checks import checked, divides, refuse
from regard.inspect.layers import Chosen, chosen
from regard.kernels import execute
from regard.kernels.problem import combine
from regard.masks import Mask, padding
from regard.pipeline.head_mixer import HeadMixer
from regard.pipeline.layer import Attention
from regard.pipeline.tokens import key_padding, quarantine, spoil

WHO = "effective_weights"

Values = Callable[[Float[Tensor, "B G S V"]], Float[Tensor, "B H T V"]]
"""A mechanism whose queries and keys are given, as a function of its values."""


def effective_weights(
    layer: nn.Module,
    x: Float[Tensor, "B T M"],
    context: Float[Tensor, "B S C"] | None = None,
    *,
    mask: Mask | Tensor | None = None,
    keys: Chosen = None,
) -> Float[Tensor, "B H T s"]:
    """The matrix with which `layer` weighs its values, for these tokens; the layer's own training mode doesn't count.

    Args:
        layer: a `regard.Attention` or a `HeadMixer`, as `regard.create` makes them.
        context, mask: as the layer takes them.
        keys: of which keys; default all. It bounds the memory: B H T numbers for each, and the calls: one for as many
            keys as a head is wide.

    Raises:
        TypeError: a layer of another kind; see `measured_weights` for functions.
        ValueError: a mechanism that is not linear in its values, or weighs their features differently.
    """
    with torch.no_grad(), undisturbed(layer):
        attend, v = values_of(layer, x, context, mask=mask)
        weights = measured_weights(attend, v, keys=keys)
        return weights.masked_fill(_unknown(layer, x, context, mask)[:, None, :, None], torch.nan)


@checked()
def measured_weights(
    attend: Values, like: Float[Tensor, "B G S V"], *, keys: Chosen = None
) -> Float[Tensor, "B H T s"]:
    """The weights of `attend`, a function from values (B, G, S, V) to outputs (B, H, T, V).

    What is added to outputs whatever the values, such as a position's own, is no weight and is left out. `like` gives
    shape, dtype and device. Source: the definition of linearity.
    """
    with torch.no_grad():
        S, V = like.shape[2:]
        which = chosen(WHO, "keys", keys, S, like.device)
        rest = attend(torch.zeros_like(like))
        _linear(attend, rest, like)
        out = rest.new_empty(*rest.shape[:3], len(which))
        for start in range(0, len(which), V):
            part = which[start : start + V]
            one_hot = torch.zeros_like(like)
            feature = torch.arange(len(part), device=like.device)
            one_hot[:, :, part, feature] = 1.0
            out[..., start : start + V] = (attend(one_hot) - rest)[..., : len(part)]
        _same(attend, rest, out, like, which)
        return out


# --- Layers as functions of their values


def reads(module: nn.Module) -> bool:
    """Whether the module is a layer whose forward is the one that `values_of` knows."""
    kind = type(module)
    return (isinstance(module, Attention) and kind.forward is Attention.forward) or (
        isinstance(module, HeadMixer) and kind.forward is HeadMixer.forward
    )


def values_of(
    layer: nn.Module, x: Tensor, context: Tensor | None = None, *, mask: Mask | Tensor | None = None
) -> tuple[Values, Tensor]:
    """The layer as a function of its values, and the values that it computes itself."""
    if isinstance(layer, Attention) and reads(layer):
        p = layer._prepare(x, context, mask, None)[0]
        return lambda v: execute(replace(p, v=v), layer.kernel), p.v
    if isinstance(layer, HeadMixer) and reads(layer):
        q, k, v, keep = projected(layer, x, context, mask)
        return lambda values: layer.mixed(q, k, values, keep, alone=context is None), v
    wanted = "a regard.Attention or HeadMixer; for others, measured_weights of a function of values"
    wrong = "is no layer of queries, keys and values that regard knows"
    refuse(WHO, "layer", wrong, type(layer).__name__, wanted, error=TypeError)


def _unknown(layer: nn.Module, x: Tensor, context: Tensor | None, mask: Mask | Tensor | None) -> Bool[Tensor, "B T"]:
    """Which rows held NaN or infinity, or may see a token that did."""
    rows = x.new_zeros(*x.shape[:2], 1)
    if isinstance(layer, Attention):
        _, _, allowed, bad = layer._prepare(x, context, mask, None)
        return spoil(rows, *bad, allowed)[..., 0].isnan()
    assert isinstance(layer, HeadMixer)
    source = x if context is None else context
    keep, allowed = key_padding(layer, mask, source), layer.receptive_field()
    return spoil(rows, quarantine(x)[1], quarantine(source)[1], allowed if keep is None else allowed & padding(keep))[
        ..., 0
    ].isnan()


def projected(
    mixer: HeadMixer, x: Float[Tensor, "B T M"], context: Tensor | None, mask: Mask | Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Bool[Tensor, "B S"] | None]:
    """Queries, keys, values and which keys are real, as the mixer's forward makes them."""
    source = x if context is None else context
    keep = key_padding(mixer, mask, source)
    return (*mixer.split(quarantine(x)[0], quarantine(source)[0]), keep)


@contextmanager
def undisturbed(layer: nn.Module) -> Iterator[None]:
    """Run a layer as in evaluation, and leave its modes and the random numbers of torch as they were."""
    modes = [(module, module.training) for module in layer.modules()]
    devices = sorted({p.device for p in layer.parameters() if p.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices=devices):
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training


# --- Whether one matrix a head tells


def _linear(attend: Values, rest: Tensor, like: Tensor) -> None:
    first, second = _drawn(like, 1), _drawn(like, 2)
    one, two, both = (attend(v) - rest for v in (first, second, 2.0 * first - 3.0 * second))
    if not _near(both, 2.0 * one - 3.0 * two):
        got = "f(2a - 3b) differs from 2 f(a) - 3 f(b)"
        refuse(WHO, "the mechanism", "is not linear in its values", got, "one that a matrix tells of")


def _same(attend: Values, rest: Tensor, weights: Tensor, like: Tensor, which: Tensor) -> None:
    v = torch.zeros_like(like).index_copy(2, which, _drawn(like, 3).index_select(2, which))
    if weights.shape[-1]:
        divides(WHO, **{"heads of values": like.shape[1], "heads of outputs": weights.shape[1]})
        if rest.shape[-1] != like.shape[-1]:
            refuse(WHO, "outputs", "have another width than values", rest.shape[-1], f"{like.shape[-1]}")
    if not _near(attend(v) - rest, combine(weights, v.index_select(2, which))):
        wrong = "mixes heads, or weighs the features of a head differently"
        refuse(WHO, "the mechanism", wrong, "outputs of more than one matrix a head", "one matrix a head")


def _drawn(like: Tensor, seed: int) -> Tensor:
    """Random values that touch no generator of the caller."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like)


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal up to what sums in this dtype lose. What is not finite proves nothing."""
    finite = a.isfinite() & b.isfinite()
    a, b = a[finite], b[finite]
    if a.numel() == 0:
        return True
    scale = torch.maximum(a.abs(), b.abs()).max()
    return not bool((a - b).abs().max() > torch.finfo(a.dtype).eps ** 0.5 * scale)
