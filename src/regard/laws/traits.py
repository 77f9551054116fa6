"""L15, L56: what a mechanism's traits say of its weights, seen from outside.

A function shows its weights where the values are one-hot. A layer does where its value projection reads one channel
of the tokens, with which they can be told apart: L56 holds for what fills slots and for what does not.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from regard.laws.agreement import close, does_not_apply, hold, same
from regard.laws.registry import MIXERS, law
from regard.laws.subject import Subject, reaches

# --- L15: the function of queries, keys and values ----------------------------------------------------------


def weights(s: Subject, causal: bool, allowed: Tensor) -> Tensor:
    """(B, H, T, S): what one-hot values show."""
    f: Any = s.form()
    q, k, _ = f.qkv()
    one_hot = torch.eye(s.length, dtype=torch.float64).expand(*k.shape[:2], s.length, s.length)
    return f(q, k, one_hot, causal=causal, mask=allowed).detach()


@law("L15", function=True, traits="linear_in_values", needs="mask")
def weights_are_as_the_traits_say(s: Subject) -> None:
    """Masked weights are exactly 0; by trait, rows sum to 1, nothing is negative, some allowed are 0, and not else."""
    f: Any = s.form()
    for causal in s.causalities:
        size = (s.batch, 1, s.length, s.length)
        drawn = torch.rand(size, generator=torch.Generator().manual_seed(0)) < 0.7
        drawn |= torch.eye(s.length, dtype=torch.bool)
        a = weights(s, causal, drawn)
        allowed = f.arguments(causal, drawn)["mask"].dense(s.length).expand_as(a)
        same(a[~allowed], torch.zeros_like(a[~allowed]), "masked weights")
        if "normalised" in s.traits:
            close(a.sum(-1), torch.ones_like(a.sum(-1)), "sum of weights")
        if "nonnegative" in s.traits:
            hold((a >= 0).all(), f"a weight is {a.min():.3g}: the trait 'nonnegative' says else")
        elif not s.foreign:
            hold((a < 0).any(), "the trait 'nonnegative' is missing")
        some = bool((a[allowed] == 0).any())
        if some or not s.foreign:
            told = f"{'some' if some else 'no'} allowed weights are 0: the trait 'sparse' says else"
            hold(some == ("sparse" in s.traits), told)


@law("L15", function=True, traits="linear_in_values")
def function_is_linear_in_values(s: Subject) -> None:
    """f(q, k, a v + b w) = a f(q, k, v) + b f(q, k, w)."""
    f: Any = s.form()
    q, k, v = f.qkv()
    w = torch.randn_like(v)
    close(f(q, k, 2.5 * v - 0.7 * w), 2.5 * f(q, k, v) - 0.7 * f(q, k, w))


# --- L56: the layer as it is built --------------------------------------------------------------------------


def maps(part: Any) -> list[nn.Linear]:
    """The linear map, or several under one name; none where it is something else."""
    if isinstance(part, nn.Linear):
        return [part]
    found = part.children() if isinstance(part, nn.Module) else ()
    return [one for one in found if isinstance(one, nn.Linear)]


@torch.no_grad()
def bare(s: Subject, module: Any) -> list[nn.Linear]:
    """Its value projections; biases of values and outputs are taken away, and so is what mixes the outputs."""
    values, outs = maps(getattr(module, "v_proj", None)), maps(getattr(module, "o_proj", None))
    if s.protocol == "FeatureMixer" or not values:
        does_not_apply("it has no v_proj that maps tokens to values")
    if any(o.in_features != o.out_features for o in outs) or (not outs and getattr(module, "o_proj", None) is not None):
        does_not_apply("its o_proj is no square map, so outputs are no means of values")
    for proj in values + outs:
        if proj.bias is not None:
            proj.bias.zero_()
    for o in outs:
        nn.init.eye_(o.weight)
    return values


def built(s: Subject) -> Iterator[tuple[Any, list[nn.Linear]]]:
    """Its layers, causal or not, and their value projections."""
    for causal in s.causalities:
        module = s.build(causal=causal)
        yield module, bare(s, module)


def source(s: Subject, column: Tensor | float | None = None) -> tuple[Tensor, ...]:
    """What it is called with; the first channel of the tokens that it reads values from is `column`."""
    given = [g.clone() for g in s.inputs()]
    if column is not None:
        given[reads(s)][..., 0] = column
    return tuple(given)


def reads(s: Subject) -> int:
    """Which of its inputs the values come from."""
    return 1 if s.protocol in ("CrossMixer", "Pointer") else 0


@torch.no_grad()
def shown(s: Subject, module: Any, values: list[nn.Linear], column: Tensor | float) -> Tensor:
    """Its weights times the column: what comes of values that are the first channel, less what comes of none."""
    given, at, met = source(s, column), reads(s), []
    for v in values:
        nn.init.zeros_(v.weight)
    hook = values[0].register_forward_pre_hook(lambda _, inputs: met.append(inputs[0][..., 0]))
    nothing = module(*given)
    want = given[at][..., 0].clone()
    if met and met[0].shape == want.shape and not torch.equal(met[0], want):  # as where positions are added
        given[at][..., 0] += want - met[0]
        met.clear()
        nothing = module(*given)
        if not torch.allclose(met[0], want):
            does_not_apply("its v_proj reads something else than the tokens")
    hook.remove()
    for v in values:
        v.weight[:, 0] = 1
    out: Tensor = module(*given)
    return out - nothing


def layer_weights(s: Subject, module: Any, values: list[nn.Linear]) -> Iterator[Tensor]:
    """For every token in turn the weights with which it is read; each time, the token alone has a 1 to show."""
    count = source(s)[reads(s)].shape[-2]
    for one in torch.eye(count, dtype=torch.float64):
        yield shown(s, module, values, one)


@law("L56", traits="linear_in_values", protocols=MIXERS)
@torch.no_grad()
def layer_is_linear_in_values(s: Subject) -> None:
    """A layer's output, before it is projected, is linear in the value projection."""
    given = source(s)
    for module, values in built(s):
        one, other = torch.randn(
            2, *values[0].weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64
        )
        outs = []
        for weight in (one, other, 2.5 * one - 0.7 * other):
            for v in values:
                v.weight.copy_(weight)
            outs.append(module(*given))
        hold(not torch.allclose(outs[0], outs[1]), "the value projection changes nothing")
        close(outs[2], 2.5 * outs[0] - 0.7 * outs[1], "output")


@law("L56", traits="normalised", protocols=MIXERS)
def equal_values_come_out(s: Subject) -> None:
    """Where all tokens have the same value, a layer of normalised weights gives that value."""
    for module, values in built(s):
        got = shown(s, module, values, 3.0)
        close(got, torch.full_like(got, 3.0), "weighted sum of values that are all 3")


@law("L56", traits="nonnegative", protocols=MIXERS, weight="heavy")
def layer_weights_are_not_negative(s: Subject) -> None:
    """No token's value counts negatively; with weights that sum to 1, outputs lie within the range of the values."""
    for module, values in built(s):
        for n, got in enumerate(layer_weights(s, module, values)):
            hold((got >= 0).all(), f"the value of token {n} has the weight {got.min():.3g}")


@law("L56", traits="sparse", protocols=MIXERS, weight="heavy")
def some_layer_weights_are_zero(s: Subject) -> None:
    """A token that may be seen, as the layer itself says, has weight exactly 0 somewhere."""
    for module, values in built(s):
        if not hasattr(module, "receptive_field"):
            does_not_apply("it doesn't say which tokens may be seen")
        allowed = module.receptive_field().dense(s.length).expand(s.batch, s.heads, s.length, s.length)
        a = torch.stack([g.unflatten(-1, (s.heads, -1))[..., 0] for g in layer_weights(s, module, values)], -1)
        hold((a.transpose(1, 2)[allowed] == 0).any(), "no weight is 0")


@law("L56", traits="routed", protocols="TokenMixer FeatureMixer", weight="heavy")
def content_decides_what_is_seen(s: Subject) -> None:
    """Which tokens count at all for an output differs from input to input."""
    x = s.tokens(6) if s.protocol == "TokenMixer" and s.given is None else s.inputs()[0]
    for causal in s.causalities:
        module = s.build(causal=causal)
        seen = [reaches(module if s.protocol == "TokenMixer" else Rows(module, x.shape[2:]), row) for row in rows(x)]
        hold(any(not torch.equal(seen[0], other) for other in seen[1:]), "every input is seen along the same pattern")


def rows(x: Tensor) -> list[Tensor]:
    """Every entry of the batch, a map (C, Y, X) as its tokens (Y X, C)."""
    return list((x if x.dim() == 3 else x.flatten(2).mT).split(1))


class Rows:
    """A layer over maps of one size, called with their tokens (B, Y X, C)."""

    def __init__(self, module: Any, size: torch.Size) -> None:
        self.module, self.size = module, size

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x.mT.unflatten(-1, self.size))
        return out.flatten(2).mT
