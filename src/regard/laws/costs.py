"""What a mechanism's forward pass costs: the card's formula next to the multiply-adds that are counted."""

import ast
import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regard import catalog
from regard.cards import Card
from regard.checks import _matches, _plan
from regard.cost import evaluate
from regard.kernels.flops import FlopCounter
from regard.laws.subject import of, tokens
from regard.shapes import HeadShape

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
"""What the formulas leave out, where a module calls them so."""


class Costs(NamedTuple):
    """Multiply-adds of one forward pass without the projections."""

    said: float
    counted: float


def compare(card: Card, *, length: int, width: int = 32, heads: int = 4, **own: Any) -> Costs:
    """The card's `cost.time` and a count of the eager kernel, at one size.

    Args:
        length: tokens, nodes or pixels, where the protocol says what goes in; else the card's own small inputs.
        width: D, so that M is `heads` times as wide.
        own: options beside the defaults, or beside those that the card's own inputs go with.
    """
    if card.inputs is not None:
        own = {**card.example, **own}
    module, given = built(card, length, heads * width, heads, own)
    values = {**letters(module, given, heads, width), **settled(card, module, own)}
    return Costs(evaluate(card.cost.time, values), count(module, given))


def built(card: Card, length: int, dim: int, heads: int, own: Mapping[str, Any]) -> tuple[nn.Module, tuple[Any, ...]]:
    """The module in float32 on its plainest kernel, and what it is called with."""
    subject = of(card.name)
    torch.manual_seed(0)
    causal = bool(subject.causalities) and subject.causalities[0]
    module = catalog.create(card.name, dim=dim, num_heads=heads, causal=causal, **own).eval()
    if isinstance(getattr(module, "kernel", None), str):
        module.kernel = "eager"
    return module, inputs(card, length, dim, heads)


def inputs(card: Card, length: int, dim: int, heads: int) -> tuple[Any, ...]:
    """One of a batch, of such a length."""

    def some(n: int, seed: int = 2) -> Tensor:
        return tokens(1, n, dim=dim, seed=seed, dtype=torch.float32)

    if card.inputs is not None:
        found = card.inputs(HeadShape(dim, heads, heads, dim // heads))
        return tuple(t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in found)
    if card.protocol == "FeatureMixer":
        sides = card.options.get("size", (math.isqrt(length),) * 2)
        return (some(math.prod(sides)).mT.reshape(1, dim, *sides).contiguous(),)
    if card.protocol == "GraphMixer":
        return (some(length)[0], torch.randint(length, (2, 8 * length), generator=torch.Generator().manual_seed(3)))
    if card.protocol in ("CrossMixer", "Pointer"):
        return (some(length // 2), some(length, 5))
    return (some(length),)


def letters(module: nn.Module, given: tuple[Any, ...], heads: int, width: int) -> dict[str, Any]:
    """The sizes of the axes that the annotations of `forward` name."""
    found: dict[str, Any] = {"B": 1, "H": heads, "G": heads, "D": width, "V": width, "M": heads * width}
    found["C"] = found["M"]
    for place, _, forms, _, _ in _plan(inspect.unwrap(type(module).forward)):
        if 1 <= place <= len(given) and isinstance(given[place - 1], Tensor):
            for axes, _ in forms:
                learned: dict[str, Any] = {}
                if _matches(given[place - 1].shape, axes, learned):
                    found |= {k: v for k, v in learned.items() if isinstance(v, int)}
                    break
    sides = given[0].shape[2:] if isinstance(given[0], Tensor) and given[0].dim() == 4 else ()
    found |= {**dict(zip("YX", sides, strict=False)), "N": found.get("N", math.prod(sides))}
    return {"S": found.get("T"), "T": found.get("T"), **found}


def settled(card: Card, module: nn.Module, own: Mapping[str, Any]) -> dict[str, Any]:
    """The options' values; the module's own, where a default is None and the module decides."""
    named = {n.id for n in ast.walk(ast.parse(card.cost.time)) if isinstance(n, ast.Name)}
    values = {**card.options, **card.preset, **own}
    return {k: getattr(module, k, None) if v is None and k in named else v for k, v in values.items()}


@torch.no_grad()
def count(module: nn.Module, given: tuple[Any, ...]) -> float:
    """Counted multiply-adds, less those of the projections."""
    with FlopCounter() as counter:
        module(*given)
    each = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    inside = [name for name in each if PROJECTIONS & {*name.split(".")}]
    outer = [name for name in inside if not any(name.startswith(f"{other}.") for other in inside)]
    return (counter.get_total_flops() - sum(each[name] for name in outer)) / 2
