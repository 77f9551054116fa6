"""BigBird's mask: of blocks, the first and last ones see and are seen by all, and each other one sees its neighbours
and some drawn at random.

What is drawn follows from numbers alone (head, block, seed), so that it is the same on every device and under
torch.compile.
"""

import functools
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from regard.checks import choice, whole
from regard.masks.checks import tensor
from regard.masks.selection import Chosen
from regard.tracing import readable

Draw = Literal["anywhere", "front"]


def bigbird(
    T: int,
    heads: int,
    *,
    block: int = 64,
    num_random: int = 3,
    num_global: int = 1,
    window: int = 1,
    draw: Draw = "anywhere",
    seed: int = 0,
    lengths: Int[Tensor, " B"] | None = None,
) -> Chosen:
    """The mask of T queries against T keys, its random blocks drawn for each of `heads` heads (1: one set for all).

    With n = ceil(T / block) blocks, fewer than 2 num_global + 2 window + 1 + num_random of them see each other wholly.

    Args:
        num_random: r, blocks that each block sees besides.
        num_global: blocks at each end that see all and are seen by all.
        window: neighbours that a block sees on each side.
        draw: "anywhere"; or at the "front", as the authors' code does for most lengths: where there are more than
            2 r + 5 blocks, among the first 2 r + 4; where there are more than r + 5, r // 2 among the first of these
            and the rest behind them. (Of one global block and one neighbour.)
        seed: of the draw, >= 0.
        lengths: how many tokens of each batch entry are real, where the others stand behind them: blocks are then those
            of its real tokens, and what is padding neither sees nor is seen. Default: all of them.
    """
    whole("bigbird", heads=heads, block=block)
    whole("bigbird", 0, T=T, num_random=num_random, num_global=num_global, window=window, seed=seed)
    choice("bigbird", get_args(Draw), draw=draw)
    options = (block, num_random, num_global, window, draw, seed)
    if lengths is not None:
        tensor("bigbird: lengths", lengths, (1,), "integer")
        return _made(T, heads, *options, lengths)
    return (_kept if readable() and not _len_torch_dispatch_stack() else _made)(T, heads, *options)


def bigbird_tiles(
    count: Int[Tensor, " B"],
    n: int,
    heads: int,
    *,
    num_random: int,
    num_global: int = 1,
    window: int = 1,
    draw: Draw = "anywhere",
    seed: int = 0,
) -> Bool[Tensor, "B H n n"]:
    """Which of n key blocks each of n query blocks sees, of which `count` are there. No branch depends on either."""
    at, r, g = torch.arange(n, device=count.device), num_random, num_global
    i, c, count = at[:, None], at, count[:, None, None, None]
    least = 2 * g + 2 * window + 1
    everybody, everything = ((x < g) | (x >= count - g) for x in (c, i))
    known = everybody | everything | ((i - c).abs() <= window)
    # Where a window reaches into the global blocks of one end, as many beside those of the other can't be drawn.
    low, high = (g + window - i).clamp(min=0), (g + window - (count - 1 - i)).clamp(min=0)
    legal = ~known & (c < count - g - low) & (c >= g + high)
    rank = _drawn(i, c, torch.arange(heads, device=count.device)[:, None, None], seed)
    if draw == "anywhere":
        drawn = _first(rank, legal, r)
    else:
        pool, end = r + least, 2 * r + least
        half = _first(rank, legal & (c < pool), r // 2) | _first(rank, legal & (c >= pool), r - r // 2)
        few = torch.where(count > pool, half, _first(rank, legal, r))
        drawn = torch.where(count > end, _first(rank, legal & (c < end - g), r), few)
    return (known | drawn | (count < least + r)) & (i < count) & (c < count)


def _drawn(i: Int[Tensor, "n 1"], c: Int[Tensor, " n"], h: Int[Tensor, "H 1 1"], seed: int) -> Int[Tensor, "H n n"]:
    """Numbers below 2^31 that look random, by a hash that never leaves 63 bits."""
    x = torch.full((), seed % 2**31, device=i.device)
    for part in (h, i, c):
        x = x ^ part
        for _ in range(2):
            x = (x ^ (x >> 16)) * 0x45D9F3B & 0x7FFFFFFF
        x = x ^ (x >> 16)
    return x


def _first(rank: Int[Tensor, "H n n"], pool: Bool[Tensor, "#B 1 n n"], k: int) -> Bool[Tensor, "#B H n n"]:
    """Of each row's pool the k that rank first, or all where it holds fewer."""
    order = rank.masked_fill(~pool, 2**31).argsort(stable=True, dim=-1)
    return pool & (order.argsort(-1) < k)


def _made(
    T: int,
    heads: int,
    block: int,
    num_random: int,
    num_global: int,
    window: int,
    draw: Draw,
    seed: int,
    lengths: Int[Tensor, " B"] | None = None,
) -> Chosen:
    lengths = torch.full((1,), T, device="cpu") if lengths is None else lengths
    options = {"num_random": num_random, "num_global": num_global, "window": window, "seed": seed}
    tiles = bigbird_tiles(-(-lengths // block), -(-T // block), heads, draw=draw, **options)
    return Chosen(tiles, T, T, (block, block))


@functools.lru_cache(maxsize=16)
def _kept(*numbers: Any) -> Chosen:
    """One object for equal numbers, so that what kernels make of it is kept, too."""
    with torch.inference_mode(False):
        return _made(*numbers)
