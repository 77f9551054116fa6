"""Masks: which keys a query may attend to, as values that combine with `&`, `|` and `~`."""

from regard.masks.algebra import Mask
from regard.masks.selection import chosen
from regard.masks.layout import BlockLayout
from regard.masks.grids import neighborhood
from regard.masks.patterns import (
    blocks,
    causal,
    dilated,
    full,
    global_tokens,
    nothing,
    strided,
    window,
)
from regard.masks.tensors import dense, documents, packed, padding, per_head, predicate, prefix

__all__ = [
    "BlockLayout",
    "Mask",
    "blocks",
    "causal",
    "chosen",
    "dense",
    "dilated",
    "documents",
    "full",
    "global_tokens",
    "neighborhood",
    "nothing",
    "packed",
    "padding",
    "per_head",
    "predicate",
    "prefix",
    "strided",
    "window",
]
