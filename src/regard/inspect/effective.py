"""Attention weights of any mechanism that is linear in its values: softmax, sparse, linear and recurrent ones alike.

    out = W(q, k) v  =>  column j of W is the output for values that are 1 at key j and 0 elsewhere

One call of the mechanism measures as many keys as its values have features, for a key may answer in each. It holds
for W that is the same for every feature; whether the mechanism is of that kind is tested before and afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.inspect.layers import Chosen, chosen
from regard.masks import Mask

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
    from regard.inspect.capture.own import values_of

    with torch.no_grad(), undisturbed(layer):
        attend, v = values_of(layer, x, context, mask=mask)
        return measured_weights(attend, v, keys=keys)


def measured_weights(attend: Values, like: Float[Tensor, "B G S V"], *, keys: Chosen = None) -> Tensor:
    """The weights of `attend`, a function from values (B, G, S, V) to outputs (B, H, T, V): (B, H, T, s).

    What is added to outputs whatever the values, such as a position's own, is no weight and is left out. `like` gives
    shape, dtype and device. Source: the definition of linearity.
    """
    with torch.no_grad():
        S, V = like.shape[2:]
        which = chosen("keys", keys, S, like.device)
        rest = attend(torch.zeros_like(like))
        _check_linear(attend, rest, like)
        out = rest.new_empty(*rest.shape[:3], len(which))
        for start in range(0, len(which), V):
            part = which[start : start + V]
            one_hot = torch.zeros_like(like)
            feature = torch.arange(len(part), device=like.device)
            one_hot[:, :, part, feature] = 1.0
            out[..., start : start + V] = (attend(one_hot) - rest)[..., : len(part)]
        _check_same(attend, rest, out, like, which)
        return out


def _check_linear(attend: Values, rest: Tensor, like: Tensor) -> None:
    first, second = _drawn(like, 1), _drawn(like, 2)
    one, two, both = (attend(v) - rest for v in (first, second, 2.0 * first - 3.0 * second))
    if not _near(both, 2.0 * one - 3.0 * two):
        raise ValueError(
            "effective_weights: the mechanism is not linear in its values (f(2a - 3b) differs from 2 f(a) - 3 f(b)), "
            "so that no matrix tells what it attends to"
        )


def _check_same(attend: Values, rest: Tensor, weights: Tensor, like: Tensor, which: Tensor) -> None:
    v = torch.zeros_like(like).index_copy(2, which, _drawn(like, 3).index_select(2, which))
    H, G = weights.shape[1], like.shape[1]
    if weights.shape[-1] and (H % G or rest.shape[-1] != like.shape[-1]):
        raise ValueError(f"effective_weights: {H} heads of outputs do not go with {G} heads of values")
    from regard.kernels.problem import combine

    if not _near(attend(v) - rest, combine(weights, v.index_select(2, which))):
        raise ValueError(
            "effective_weights: the mechanism mixes heads, or weighs the features of a head differently, so that it "
            "takes more than one matrix a head to tell what it attends to"
        )


def _drawn(like: Tensor, seed: int) -> Tensor:
    """Random values that touch no generator of the caller."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like)


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal up to what sums in this dtype lose. What is not finite proves nothing."""
    if a.numel() == 0:
        return True
    scale = torch.maximum(a.abs(), b.abs()).max()
    return not bool((a - b).abs().max() > torch.finfo(a.dtype).eps ** 0.5 * scale)


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
