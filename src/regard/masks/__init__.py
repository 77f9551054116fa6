"""Masks: which keys a query may attend to, as values that combine with `&`, `|` and `~`."""

from regard.masks.algebra import Mask
from regard.masks.flex import from_block_mask, from_mask_mod
from regard.masks.grids import neighborhood
from regard.masks.layout import BlockLayout
from regard.masks.lists import listed
from regard.masks.patterns import (
    blocks,
    causal,
    dilated,
    full,
    near_blocks,
    nothing,
    offset,
    strided,
    window,
)
from regard.masks.random_blocks import bigbird
from regard.masks.selection import chosen
from regard.masks.shifted import multi_window, shifted_chunks, shifted_dilated, shifted_groups
from regard.masks.structured import block_causal, block_diffusion, global_tokens, shared_prefix, tree
from regard.masks.tensors import dense, documents, packed, padding, per_head, predicate, prefix
from regard.masks.tiling import tile_cost
from regard.masks.words import queries, same_token, segments

__all__ = [
    "BlockLayout",
    "Mask",
    "bigbird",
    "block_causal",
    "block_diffusion",
    "blocks",
    "causal",
    "chosen",
    "dense",
    "dilated",
    "documents",
    "from_block_mask",
    "from_mask_mod",
    "full",
    "global_tokens",
    "listed",
    "multi_window",
    "near_blocks",
    "neighborhood",
    "nothing",
    "offset",
    "packed",
    "padding",
    "per_head",
    "predicate",
    "prefix",
    "queries",
    "same_token",
    "segments",
    "shared_prefix",
    "shifted_chunks",
    "shifted_dilated",
    "shifted_groups",
    "strided",
    "tile_cost",
    "tree",
    "window",
]
