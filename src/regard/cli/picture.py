"""Pictures for `regard show`: what a mechanism adds by distance, or which keys a query may see."""

from collections.abc import Sequence

import torch
from torch import nn

from regard.cards import Card
from regard.catalog import create
from regard.index import SMALL, lacks
from regard.masks import Mask
from regard.spec import Spec
from regard.stages import Position, Rows

DISTANCES = 64
LEVELS = "▁▂▃▄▅▆▇█"

BUILT = ("TokenMixer", "CrossMixer", "FeatureMixer", "GraphMixer", "Pooler", "Pointer", "Loss")
"""Protocols whose modules `show` builds, to look at them and to check the options given."""


def small(cards: Sequence[Card], spec: Spec) -> nn.Module | None:
    """A small instance of the parts together, causal where they can be; None for what is no layer."""
    first = cards[0]
    if len(cards) == 1 and (first.is_function or first.protocol not in BUILT):
        own = spec.parts[0].options
        if first.is_function and own:
            raise ValueError(f"show: {first.name} is a function; leave its options {sorted(own)} out")
        for name in own.keys() - first.options.keys():
            raise ValueError(f"show: {lacks(first.name, 'option', name, first.options)}")
        return None
    causal = all("causal" in card.supports for card in cards)
    written = {name for part in spec.parts for name in part.options}
    example = {name: value for card in cards for name, value in card.example.items() if name not in written}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the page of trained biases should read the same every time
        return create(str(spec), **SMALL, causal=causal, **example)


def field(module: nn.Module | None) -> Mask | None:
    """Its receptive field, where it has one that can be drawn."""
    ask = getattr(module, "receptive_field", None)
    found = ask() if callable(ask) else None
    return found if isinstance(found, Mask) else None


def picture(module: nn.Module | None, length: int = 24) -> list[str]:
    """What the mechanism adds by distance if that is free of the data, else which keys a query may see."""
    if lines := [] if module is None else bias_picture(module):
        return lines
    mask = field(module)
    return [] if mask is None else mask.picture(length).splitlines()


def bias_picture(module: nn.Module) -> list[str]:
    """One line a head: the bias by distance, from 0; [] where there is none, or it reads the data."""
    position = getattr(module, "position", None)
    if not isinstance(position, Position) or not position.changes("bias") or position.needs or position.prepares():
        return []
    bias, other = _bias(module, position, 0), _bias(module, position, 1)
    if bias is None or other is None or not torch.equal(bias, other) or float(bias.amin()) == float(bias.amax()):
        return []
    # How much of a key's weight is left, on one scale for all heads; the bias itself has no natural bounds.
    left = (bias - bias.amax(1, keepdim=True)).exp()
    lines = [f"share of a key's weight left at distance 0 .. {DISTANCES - 1} ({LEVELS[0]} none, {LEVELS[-1]} all)"]
    for head, row in enumerate(left.tolist()):
        lines.append(f"head {head}  " + "".join(LEVELS[min(7, int(8 * x))] for x in row))
    return lines


def _bias(module: nn.Module, position: Position, seed: int) -> torch.Tensor | None:
    """(H, distance), for the last of DISTANCES queries and random data."""
    if position.prepares():  # it asks for tokens, or for where they stand
        return None
    H, G, D = (int(getattr(module, name)) for name in ("num_heads", "num_kv_heads", "head_dim"))
    draw = torch.Generator().manual_seed(seed)
    q, k = torch.randn(1, H, 1, D, generator=draw), torch.randn(1, G, DISTANCES, D, generator=draw)
    j = torch.arange(DISTANCES)
    with torch.no_grad():
        bias = position.bias(Rows(q=q, k=k, scores=q.new_empty(0), i=j[-1:], j=j))
    return None if bias is None else bias.expand(1, H, 1, DISTANCES)[0, :, 0].flip(-1)
