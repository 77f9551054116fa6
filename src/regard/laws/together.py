"""L49: what is claimed holds together: every pair of `supports` in one call gives what each alone gives."""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from regard import masks
from regard.laws.agreement import close, hold, same
from regard.laws.registry import law
from regard.laws.streaming import stream
from regard.laws.subject import Subject, pairs


def grouped(s: Subject) -> list[dict[str, Any]]:
    """Options: none, and fewer key heads where those are claimed."""
    return [{}, *([dict(s.groups)] if "gqa" in s.supports and s.groups else [])]


def hidden(s: Subject, length: int) -> Tensor:
    """(B, S) bool: padding in front and behind, of another length in each row; row 0 has none in front."""
    keep = torch.ones(s.batch, length, dtype=torch.bool)
    for row in range(s.batch):
        keep[row, length - 1 - row :] = False
        keep[row, :row] = False
    return keep


def worst(s: Subject) -> float:
    """What hidden tokens may hold at worst."""
    return torch.nan if s.nan_safe else 1e3


def poisoned(x: Tensor, keep: Tensor, value: float) -> Tensor:
    """`value` wherever a token is hidden."""
    return x.masked_fill(~keep[..., None], value)


@law("L49", needs="padding cross", weight="heavy")
def padding_of_a_context(s: Subject) -> None:
    """Hidden keys of a context are as if cut away, whatever they hold; so with fewer key heads."""
    for causal, options in itertools.product(s.crossings, grouped(s)):
        module, x, context = s.build(causal=causal, **options), s.tokens(), s.context()
        keep = hidden(s, context.shape[1])
        keep[0] = True
        got = module(x, poisoned(context, keep, worst(s)), mask=masks.padding(keep))
        if not causal:  # where the order counts, cutting moves the rest
            close(got[:1], module(x[:1], context[:1]), f"nothing hidden, {options}")
            if "position_free" in s.traits:
                for row in range(1, s.batch):
                    cut = module(x[row : row + 1], context[row : row + 1, keep[row]])
                    close(got[row : row + 1], cut, f"cut context, {options}")
        other = module(x, poisoned(context, keep, 1e4), mask=masks.padding(keep))
        same(other, got, f"what hidden keys hold, {options}")


@law("L49", needs="mask cross", weight="heavy")
def mask_of_a_context(s: Subject) -> None:
    """A mask of pairs over a context that hides whole keys is the padding of them; with padding, both hide."""
    for causal, options in itertools.product(s.crossings, grouped(s)):
        module, x, context = s.build(causal=causal, **options), s.tokens(), s.context()
        T, S = x.shape[1], context.shape[1]
        keep = hidden(s, S)
        each = keep[:, None, None].expand(-1, 1, T, S)
        want = module(x, context, mask=masks.padding(keep))
        close(module(x, context, mask=each), want, f"as pairs, {options}")
        some = torch.rand(1, 1, T, S, generator=torch.Generator().manual_seed(1)) < 0.6
        both = module(x, context, mask=masks.dense(some) & masks.padding(keep))
        close(both, module(x, context, mask=some & each), f"pairs and padding, {options}")


@law("L49", needs="mask causal", weight="heavy")
def mask_of_a_causal_layer(s: Subject) -> None:
    """A mask and causality hide what either hides; with padding and fewer key heads, too."""
    for options in grouped(s):
        module, x, keep = s.build(causal=True, **options), s.tokens(), hidden(s, s.length)
        mask, past = pairs(s.batch, s.length), torch.ones(s.length, s.length, dtype=torch.bool).tril()
        want = module(x, mask=mask & past)
        close(module(x, mask=mask), want, f"the mask alone, {options}")
        close(module(x, mask=masks.dense(mask) & masks.causal()), want, f"as masks, {options}")
        padded = module(x, mask=masks.dense(mask) & masks.padding(keep))
        close(padded, module(x, mask=mask & past & keep[:, None, None]), f"with padding, {options}")
        if s.is_part and "bidirectional" in s.supports and not isinstance(s.example.get("causal"), bool):
            open_ = s.build(causal=False, **options)
            open_.load_state_dict(module.state_dict())
            if open_.receptive_field() == masks.full():  # else its own mask is another
                close(open_(x, mask=mask & past), want, f"the mask of both in a layer that sees all, {options}")


@law("L49", needs="padding causal")
def padding_of_a_causal_layer(s: Subject) -> None:
    """Hidden tokens in front and behind hold anything: the real ones' outputs are the same bit for bit."""
    for options in grouped(s):
        module, x, keep = s.build(causal=True, **options), s.tokens(), hidden(s, s.length)
        mask = masks.padding(keep)
        want = module(poisoned(x, keep, 0.0), mask=mask)[keep]
        hold(want.isfinite().all(), f"a real token's output is not finite, {options}")
        for value in (1e4, worst(s)):
            same(module(poisoned(x, keep, value), mask=mask)[keep], want, f"{value} in hidden tokens, {options}")


@law("L49", needs="streaming", weight="heavy")
@torch.no_grad()
def features_of_a_stream(s: Subject) -> None:
    """Token by token is the full pass with fewer key heads, in eval with dropout, and under autograd's eye or not."""
    x = s.tokens()
    dropout: list[dict[str, Any]] = [{"dropout": 0.5}] if "dropout" in s.supports else []
    for options in [*grouped(s), *dropout]:
        module = s.build(causal=True, **options)
        close(stream(module, x, [3, 1, s.length - 4]), module(x), f"{options}")


@law("L49", needs="streaming padding", weight="heavy")
@torch.no_grad()
def padding_of_a_stream(s: Subject) -> None:
    """Left padding, NaN in it, is hidden in a stream as in the full pass; so is what is hidden later."""
    for options in grouped(s):
        module, x = s.build(causal=True, **options), s.tokens()
        hold("mask" in inspect.signature(module.step).parameters, "step takes no mask")
        keep = hidden(s, s.length)
        keep[-1, : s.length // 2] = False  # a whole chunk
        x = poisoned(x, keep, worst(s))
        want = module(x, mask=masks.padding(keep))
        for sizes in ([1] * s.length, [2, 1, s.length - 3]):
            got = stream(module, x, sizes, keep=keep)
            hold(got[keep].isfinite().all(), "NaN of a hidden token reaches a real one")
            close(got[keep], want[keep], f"chunks {sizes}, {options}")


@law("L49", needs="streaming mask", weight="heavy")
@torch.no_grad()
def mask_of_a_stream(s: Subject) -> None:
    """A mask of pairs over absolute positions hides in a stream what it hides in the full pass."""
    for options in grouped(s):
        module, x = s.build(causal=True, **options), s.tokens()
        hold("mask" in inspect.signature(module.step).parameters, "step takes no mask")
        for mask in (masks.window(3), masks.window(4) & masks.padding(hidden(s, s.length))):
            got = stream(module, x, [2, 1, s.length - 3], mask=mask)
            close(got, module(x, mask=mask), f"{mask!r}, {options}")


def unchanged(got: Tensor, want: Tensor, what: str) -> None:
    """Bit for bit, NaN at the same places."""
    hold(torch.equal(got.isnan(), want.isnan()), f"{what}: NaN at other places")
    same(got.nan_to_num(), want.nan_to_num(), what)


def dropped(s: Subject, causal: bool) -> Iterator[tuple[str, dict[str, Any], tuple[Tensor, ...], dict[str, Any]]]:
    """Name, build options, inputs and call options of each feature that may stand beside another."""
    x, keep = s.inputs(), hidden(s, s.length)
    yield "causal" if causal else "bidirectional", {}, x, {}
    if s.protocol != "TokenMixer":
        return
    for options in grouped(s)[1:]:
        yield "gqa", options, x, {}
    if "padding" in s.supports:
        yield "padding", {}, (poisoned(x[0], keep, worst(s)),), {"mask": masks.padding(keep)}
    if "packed" in s.supports:
        ends = torch.tensor([0, 1, s.length - 4, s.length], dtype=torch.int32)
        yield "packed", {}, x, {"mask": masks.packed(ends)}
    if "mask" in s.supports:
        yield "mask", {}, x, {"mask": pairs(s.batch, s.length)}
    if "cross" in s.supports and causal in s.crossings:
        yield "cross", {}, (*x, s.context()), {}


@law("L49", needs="dropout", protocols="TokenMixer GraphMixer", weight="heavy")
def dropout_beside_the_rest(s: Subject) -> None:
    """With every other feature dropout does nothing in eval, nothing at probability 0, and something in training."""
    for causal in s.causalities:
        for name, options, given, call in dropped(s, causal):
            want = s.build(causal=causal, **options)(*given, **call)
            module = s.build(causal=causal, dropout=0.5, **options)
            unchanged(module(*given, **call), want, f"{name} and dropout in eval")
            torch.manual_seed(0)
            got = module.train()(*given, **call)
            off = (got != want) & want.isfinite()
            hold(off.any(), f"{name}: dropout changes nothing in training")
            hold(got[want.isfinite()].isfinite().all(), f"{name}: dropout makes NaN or inf")
            zero = s.build(causal=causal, dropout=0.0, **options).train()
            unchanged(zero(*given, **call), want, f"{name} and dropout=0 in training")


@law("L49", needs="compile", weight="long")
def compiled_beside_the_rest(s: Subject) -> None:
    """Compiled whole, every other feature gives what it gives eagerly."""
    for causal in s.causalities:
        for name, options, given, call in dropped(s, causal):
            module = s.build(causal=causal, **options)
            want = module(*given, **call)
            torch._dynamo.reset()
            got = torch.compile(module, backend="eager", fullgraph=True)(*given, **call)
            close(got, want, f"compiled with {name}")
            if "dropout" in s.supports:
                module = s.build(causal=causal, dropout=0.5, **options).train()
                torch.manual_seed(0)
                want = module(*given, **call)
                torch._dynamo.reset()
                torch.manual_seed(0)
                got = torch.compile(module, backend="eager", fullgraph=True)(*given, **call)
                hold(got.shape == want.shape, f"compiled with {name} and dropout: shape {tuple(got.shape)}")
                hold(torch.equal(got.isfinite(), want.isfinite()), f"compiled with {name} and dropout: NaN elsewhere")
