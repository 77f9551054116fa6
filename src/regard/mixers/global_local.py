"""Global-local attention: two softmaxes over four pieces, and the window evaluated block by block.

What `regard.mixers.etc` says in formulas. N long and NG global tokens, R = radius.
"""

import math
from typing import Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from regard.kernels.blocks import from_blocks, in_blocks
from regard.kernels.sums import over_keys
from regard.normalizers.softmax import softmax
from regard.tracing import exporting

P = TypeVar("P")


class Pieces(NamedTuple, Generic[P]):
    """One thing for each of the four pieces, named query-to-key: l long, g global."""

    l2l: P
    l2g: P
    g2g: P
    g2l: P


class Table(NamedTuple):
    """Relative labels: a vector and a number for each label and head."""

    vector: Float[Tensor, "R H D"]
    number: Float[Tensor, "R H"]


NOTHING: Pieces[Tensor | None] = Pieces(None, None, None, None)


def global_local_attention(
    long_q: Float[Tensor, "B H N D"],
    global_q: Float[Tensor, "B H NG D"],
    k: Pieces[Tensor],
    v: Pieces[Tensor],
    *,
    radius: int,
    masks: Pieces[Tensor | None] = NOTHING,
    labels: Pieces[Tensor | None] = NOTHING,
    long_table: Table | None = None,
    global_table: Table | None = None,
    dropout: float = 0.0,
) -> tuple[Float[Tensor, "B H N V"], Float[Tensor, "B H NG V"]]:
    """Attend globally and locally. Keys and values of each piece are (B, H, keys, width).

    Masks (bool, True = may attend) and labels (int) of l2l are (B|1, N, 2 radius + 1): column r of row i is
    key i + r - radius, ignored where that is outside. Those of the other pieces are (B|1, queries, keys).
    """
    N, D = long_q.shape[2:]
    width, globals_ = 2 * radius + 1, global_q.shape[2]
    inside = window(torch.ones(1, N, dtype=torch.bool, device=long_q.device), radius)
    l2l = inside if masks.l2l is None else inside & masks.l2l.bool()
    block = max(radius, 32) if exporting() else min(max(radius, 32), max(N, radius, 1))
    scores = torch.cat([_local_scores(long_q, k.l2l, radius, block), long_q @ k.l2g.mT], -1)
    scores = scores + _label_scores(long_q, long_table, labels.l2l, labels.l2g, (width, globals_))
    weights = softmax(scores / math.sqrt(D), _join(l2l, masks.l2g, (N, globals_))[:, None])
    weights = F.dropout(weights, dropout) if dropout else weights
    near, far = weights.split([width, globals_], -1)
    long_out = _local_values(near, v.l2l, radius, block) + far @ v.l2g

    scores = torch.cat([global_q @ k.g2g.mT, global_q @ k.g2l.mT], -1)
    scores = scores + _label_scores(global_q, global_table, labels.g2g, labels.g2l, (globals_, N))
    g2g = l2l.new_ones(1, globals_, globals_) if masks.g2g is None else masks.g2g.bool()
    weights = softmax(scores / math.sqrt(D), _join(g2g, masks.g2l, (globals_, N))[:, None])
    weights = F.dropout(weights, dropout) if dropout else weights
    return long_out, over_keys(weights, torch.cat([v.g2g, v.g2l], 2))


def window(z: Tensor, radius: int) -> Tensor:
    """(B, N) -> (B, N, 2 radius + 1): what stands at i - radius .. i + radius, zero outside."""
    if z.shape[1] == 0:
        return z.new_zeros(z.shape[0], 0, 2 * radius + 1)
    view = F.pad(z, (radius, radius)).unfold(1, 2 * radius + 1, 1)
    return view.contiguous() if exporting() else view  # both its strides are 1: torch asks for the longer axis


def _join(near: Tensor, far: Tensor | None, shape: tuple[int, int]) -> Bool[Tensor, "#B t s"]:
    far = near.new_ones(1, *shape) if far is None else far.bool()
    size = max(near.shape[0], far.shape[0])
    return torch.cat([near.expand(size, -1, -1), far.expand(size, -1, -1)], -1)


def _label_scores(
    q: Float[Tensor, "B H t D"],
    table: Table | None,
    near: Tensor | None,
    far: Tensor | None,
    widths: tuple[int, int],
) -> Tensor | float:
    """q . E[label] + e0[label] of both pieces: one product with the table and a look-up; 0 without labels."""
    if table is None:
        return 0.0
    each = torch.einsum("bhtd,rhd->bhtr", q, table.vector) + table.number.T[:, None]
    B, H, t, _ = q.shape

    def look_up(label: Tensor | None, width: int) -> Tensor:
        return (
            q.new_zeros(B, H, t, width) if label is None else each.gather(3, label.long()[:, None].expand(B, H, t, -1))
        )

    return torch.cat([look_up(near, widths[0]), look_up(far, widths[1])], -1)


def _blocks(z: Float[Tensor, "B H N D"], block: int, *, around: bool) -> Float[Tensor, "B H n c D"]:
    """Cut tokens into blocks; `around` adds the block before and the block after (zeros at the ends)."""
    # Contiguous first: padding by nothing keeps strides, which a graph compiled for some padding does not expect.
    own = in_blocks(z.contiguous(), block, 2)
    if not around:
        return own
    wide = F.pad(own, (0, 0, 0, 0, 1, 1))
    return torch.cat([wide[:, :, :-2], own, wide[:, :, 2:]], 3)


def _columns(radius: int, block: int, device: torch.device) -> Int[Tensor, "c W"]:
    """Which of the 3 block keys around a block are the window of its query c."""
    return block + torch.arange(block, device=device)[:, None] + torch.arange(-radius, radius + 1, device=device)


def _local_scores(q: Tensor, k: Tensor, radius: int, block: int) -> Float[Tensor, "B H N W"]:
    scores = _blocks(q, block, around=False) @ _blocks(k, block, around=True).mT
    columns = _columns(radius, block, q.device).expand(*scores.shape[:3], -1, -1)
    return from_blocks(scores.gather(4, columns), q.shape[2], 2)


def _local_values(weights: Float[Tensor, "B H N W"], v: Tensor, radius: int, block: int) -> Float[Tensor, "B H N V"]:
    cut = _blocks(weights, block, around=False)
    columns = _columns(radius, block, v.device).expand(*cut.shape[:3], -1, -1)
    wide = cut.new_zeros(*cut.shape[:4], 3 * block).scatter(4, columns, cut)
    return from_blocks(wide @ _blocks(v, block, around=True), weights.shape[2], 2)


def distance_labels(distance: Int[Tensor, "..."], max_distance: int) -> Int[Tensor, "..."]:
    """Labels 0 .. 2K of key minus query positions: to the right 0 .. K, to the left K + 1 .. 2K."""
    right, left = distance.clamp(0, max_distance), (-distance).clamp(0, max_distance)
    return torch.where(distance < 0, max_distance + left, right)
