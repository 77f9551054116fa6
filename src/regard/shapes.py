"""Sizes that parts are built for, and their letters.

Axes, everywhere: B batch, H query heads, G key/value heads, T queries, S keys, D query/key head width, V value head
width, M model width, C channels, Y X height and width of feature maps, N nodes, E edges, L latents or landmarks.
"""

from dataclasses import dataclass

from regard.checks import refuse, whole


@dataclass(frozen=True)
class HeadShape:
    """The widths that a part is built for."""

    dim: int
    """M, the model width."""
    num_heads: int
    """H."""
    num_kv_heads: int
    """G; query head h reads key head h // (H / G)."""
    head_dim: int
    """D."""


def head_shape(
    dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *, who: str = "Attention"
) -> HeadShape:
    """G and D for these widths, where they are not given: H and M / H. Raises where they don't divide."""
    whole(who, dim=dim, num_heads=num_heads)
    for name, n in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        if n is not None:
            whole(who, **{name: n})
    if head_dim is None and dim % num_heads:
        refuse(who, "dim", f"is no multiple of num_heads = {num_heads}", dim, "one that is, or head_dim=")
    G = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % G:
        refuse(
            who, "num_heads", f"is no multiple of num_kv_heads = {G}", num_heads, "key heads that divide query heads"
        )
    return HeadShape(dim, num_heads, G, dim // num_heads if head_dim is None else head_dim)
