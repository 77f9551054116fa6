"""Neighborhood attention by tiles: queries that stand close together share one slab of keys and values.

Along every axis the queries of a dilation group are cut into tiles of b; all that a tile's queries see lies in about
b + k - s neighbouring places, its slab. The tiles of several axes are their products. Slabs are gathered, and each
tile attends to its own through torch's fused kernel, under the mask inside the slab. Time and memory are linear in
the number of tokens; what is computed in vain is a factor of ((b + k - s) / k)^axes, 1 where windows are blocks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.kernels.cost import MASKED, Cost, checked, products
from regard.kernels.problem import Problem
from regard.kernels.problem import softmax as masked_softmax
from regard.kernels.sdpa import torch_kernels
from regard.masks.grids import Axis, Neighborhood

TILE = {1: 32, 2: 8, 3: 4}
"""Queries of a tile along each axis, by the number of axes; measured on a CPU."""
ENTRIES = 2**24
"""Scores, of one head, formed together."""


def why_not(p: Problem) -> list[str]:
    """Its mask must be a neighborhood and nothing else, over plain softmax attention."""
    if p.mask is None:
        return ["no mask; it needs a neighborhood"]
    if not isinstance(p.mask, Neighborhood):
        return ["the mask is not a neighborhood"]
    reasons = []
    N = math.prod(p.mask.sizes)
    if not p.q.shape[2] == p.k.shape[2] == N or p.first_key:
        reasons.append(f"{p.q.shape[2]} queries and {p.k.shape[2]} keys; the neighborhood has {N} tokens")
    if p.stages or p.bias is not None:
        reasons.append("it does plain softmax attention: no bias and no stages")
    return reasons


class Extra(NamedTuple):
    """Keys and values besides the map's, which every query sees."""

    keys: Float[Tensor, "B G E D"]
    values: Float[Tensor, "B G E V"]


def run(p: Problem, table: Float[Tensor, " H *offsets"] | None = None, extra: Extra | None = None) -> Tensor:
    """Outputs (B, H, T, V) of a problem whose mask is a neighborhood.

    `table` is added to the scores: entry [h, ..., u - p + k - 1, ...] by the distance of key and query along each axis,
    counted in steps of its dilation. `extra` keys share the one softmax.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | None) -> tuple[Tensor]:
        if bias is not None:
            return _scored(p, q, k, v, seen, bias)[:1]
        with torch_kernels(p):
            return (F.scaled_dot_product_attention(q, k, v, seen[:, None], p.dropout, scale=p.scale),)

    return _by_tiles(p, table, extra, attend)[0]


def with_lse(
    p: Problem, table: Float[Tensor, " H *offsets"] | None = None, extra: Extra | None = None
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H T"]]:
    """The same, and the log of the sum of the exponentials of each query's scores. Keeps the scores of all tiles."""
    out, lse = _by_tiles(p, table, extra, partial(_scored, p))
    return out, lse[..., 0]


def _by_tiles(
    p: Problem, table: Tensor | None, extra: Extra | None, attend: Callable[..., tuple[Tensor, ...]]
) -> list[Float[Tensor, "B H T _"]]:
    """What `attend` gives for the queries of each tile, put back into the order of the map."""
    assert isinstance(p.mask, Neighborhood)
    tiles = cut(p.mask, p.q.device)
    B, H, G, _, _ = p.shape
    k, v, *more = (z if H == G else z.repeat_interleave(H // G, 1) for z in (p.k, p.v, *(extra or ())))
    E = more[0].shape[2] if more else 0
    count, n, m = tiles.seen.shape
    step = max(1, ENTRIES // (n * (m + E)))
    parts = []
    for start in range(0, count, step):
        part = slice(start, start + step)
        queries, keys, seen = tiles.queries[part], tiles.keys[part], tiles.seen[part]
        # Tiles come first and (batch, head) second, so that one mask for each tile serves all heads.
        q_tile, k_slab, v_slab = (_gather(z, at) for z, at in ((p.q, queries), (k, keys), (v, keys)))
        bias = None if table is None else F.embedding(tiles.offsets(part), table.flatten(1).T)
        if E:
            k_slab, v_slab = (
                torch.cat([z, one.flatten(0, 1).expand(len(z), -1, -1, -1)], 2)
                for z, one in zip((k_slab, v_slab), more, strict=True)
            )
            seen = F.pad(seen, (0, E), value=True)
            bias = None if bias is None else F.pad(bias, (0, 0, 0, E))
        parts.append(attend(q_tile, k_slab, v_slab, seen, bias))
    found = [torch.cat(z) if len(z) > 1 else z[0] for z in zip(*parts, strict=True)]
    flat = [z.transpose(0, 1).reshape(B, H, count * n, z.shape[3]) for z in found]
    return [z.index_select(2, tiles.home) for z in flat]


def cost(p: Problem) -> Cost:
    """Every tile of queries against its slab, which is gathered."""
    assert isinstance(p.mask, Neighborhood)
    B, H, _, T, S = p.shape
    pairs, axes = scored(p.mask), p.mask.axes
    queries = math.prod(tile_sizes(axis, _tile(axis, len(axes)))[0] for axis in axes)
    gathered = 2.0 * pairs / queries * (p.q.shape[3] + p.v.shape[3]) * p.q.element_size()
    traffic = B * H * (gathered + MASKED * pairs) + 30.0 * pairs
    calls = 28 + 72 * len(axes) + 12 * -(-pairs // ENTRIES)
    words = f"{pairs / (T * S):.1%} of the scores formed, in tiles"
    return Cost(products(p, pairs), traffic, calls, words, streamed=checked(p))


def _gather(z: Float[Tensor, "B H N D"], at: Int[Tensor, "tiles n"]) -> Float[Tensor, "tiles BH n D"]:
    """The rows `at` of every head, tile by tile."""
    return z.index_select(2, at.flatten()).flatten(0, 1).unflatten(1, at.shape).transpose(0, 1)


def _scored(
    p: Problem,
    q: Float[Tensor, "tiles BH n D"],
    k: Float[Tensor, "tiles BH m D"],
    v: Float[Tensor, "tiles BH m V"],
    seen: Bool[Tensor, "tiles n m"],
    bias: Float[Tensor, "tiles n m H"] | None,
) -> tuple[Float[Tensor, "tiles BH n V"], Float[Tensor, "tiles BH n 1"]]:
    """Scores written out: torch's fused kernel takes no bias that wants gradients, and tells no log-sum-exp."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) * p.scale) @ k.to(wide).mT
    if bias is not None:
        heads = scores.unflatten(1, (-1, bias.shape[-1])) + bias.to(wide).permute(0, 3, 1, 2)[:, None]
        scores = heads.flatten(1, 2)
    lse = scores.masked_fill(~seen[:, None], -math.inf).logsumexp(-1, keepdim=True)
    weights = F.dropout(masked_softmax(scores, seen[:, None]), p.dropout)
    return (weights @ v.to(wide)).to(v.dtype), lse


# --- which tiles there are ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """Where the queries and the slab of each tile stand in the sequence."""

    queries: Int[Tensor, "tiles n"]
    keys: Int[Tensor, "tiles m"]
    seen: Bool[Tensor, "tiles n m"]
    home: Int[Tensor, " N"]
    """Where the outputs of the tiles, one after the other, hold that of each token."""
    axes: tuple[Axis, ...]

    def offsets(self, part: slice) -> Int[Tensor, "tiles n m"]:
        """Where a flattened table of distances holds that of each pair."""
        i, j = self.queries[part, :, None], self.keys[part, None]
        at, step, entries = torch.zeros_like(i), 1, 1
        for axis in reversed(self.axes):
            distance = (j // step % axis.size - i // step % axis.size) // axis.dilation
            # What the mask hides may be farther away than the table reaches.
            at = at + entries * (distance + axis.window - 1).clamp(0, 2 * axis.window - 2)
            step, entries = step * axis.size, entries * (2 * axis.window - 1)
        return at


def cut(mask: Neighborhood, device: torch.device) -> Tiles:
    """The tiles of all axes together."""
    queries, keys, seen, home = cut_axis(mask.axes[0], _tile(mask.axes[0], len(mask.axes)), device)
    tile, slot = home // queries.shape[1], home % queries.shape[1]
    for axis in mask.axes[1:]:
        q, k, s, home = cut_axis(axis, _tile(axis, len(mask.axes)), device)
        queries, keys = _outer(queries * axis.size, q, torch.add), _outer(keys * axis.size, k, torch.add)
        seen = _outer(seen, s, torch.logical_and)
        t, b = q.shape
        tile, slot = _outer(tile * t, home // b, torch.add), _outer(slot * b, home % b, torch.add)
    return Tiles(queries, keys, seen, tile * queries.shape[1] + slot, mask.axes)


def _tile(axis: Axis, axes: int) -> int:
    """Queries of a tile along this axis: a wide window of a single axis asks for more, so that less is copied."""
    return TILE[axes] if axes > 1 else max(TILE[axes], axis.window // 4)


def tile_sizes(axis: Axis, tile: int) -> tuple[int, int]:
    """Queries of a tile, `tile` or so, and keys of its slab."""
    k, s, longest = axis.window, axis.stride, -(-axis.size // axis.dilation)
    b = min(longest, max(s, tile // s * s))
    b = min(longest, -(-longest // (-(-longest // b) * s)) * s)  # tiles of one size, and of whole strides
    return b, min(longest, (b - 1) // s * s + k)


def scored(mask: Neighborhood) -> int:
    """How many scores of one head are formed."""
    count = 1
    for axis in mask.axes:
        b, W = tile_sizes(axis, _tile(axis, len(mask.axes)))
        longest = -(-axis.size // axis.dilation)
        count *= axis.dilation * -(-longest // b) * b * W
    return count


def cut_axis(axis: Axis, tile: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries (t, b), slabs (t, W), what is seen (t, b, W), and where each place is found among the t * b queries."""
    L, d = axis.size, axis.dilation
    longest = -(-L // d)
    b, W = tile_sizes(axis, tile)
    g = torch.arange(d, device=device)[:, None]
    n = (L - g + d - 1) // d  # tokens of each dilation group
    p = torch.arange(-(-longest // b) * b, device=device)
    queries = (p.minimum(n - 1) * d + g).view(-1, b)  # the last one of a group again, where a tile is not full
    first, last = ((edge // d)[..., None] for edge in axis.bounds(queries))
    n = n.expand(d, p.shape[0] // b).reshape(-1, 1)
    start = first[:, 0].minimum(n - W).clamp(min=0)
    u = start + torch.arange(W, device=device)
    seen = (u[:, None] >= first) & (u[:, None] <= last)
    keys = u.minimum(n - 1) * d + queries[:, :1] % d
    place = torch.arange(L, device=device)
    return queries, keys, seen, place % d * p.shape[0] + place // d


def _outer(a: Tensor, b: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Every entry of a with every entry of b; axis by axis, a's index is the slow one."""
    pairs = combine(a.reshape([x for n in a.shape for x in (n, 1)]), b.reshape([x for n in b.shape for x in (1, n)]))
    return pairs.reshape([n * m for n, m in zip(a.shape, b.shape, strict=True)])
