"""The branches of native sparse attention: blocks in brief, those chosen by them to be read in full, and a window."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.kernels.blocks import among
from regard.kernels.check import check_inputs
from regard.kernels.problem import dots
from regard.masks import Mask, causal, padding
from regard.masks import window as near
from regard.masks.selection import Chosen
from regard.normalizers.softmax import softmax
from regard.pipeline.function import attention
from regard.tracing import exporting

PAIRS = 2**24
"""Scores of blocks formed together while choosing."""


class Brief(NamedTuple):
    """Blocks in brief: one key and value for `length` tokens, every `stride` tokens."""

    k: Float[Tensor, "B G n D"]
    v: Float[Tensor, "B G n V"]
    real: Bool[Tensor, "#B n"]
    """False for blocks of hidden tokens alone."""
    length: int
    stride: int

    def seen(self, i: Int[Tensor, " t"]) -> Bool[Tensor, "#B 1 t n"]:
        """Which are past, their last token at the latest the query."""
        last = torch.arange(self.real.shape[1], device=i.device) * self.stride + self.length - 1
        return (last <= i[:, None]) & self.real[:, None, None]


def complete(S: int, length: int, stride: int) -> int:
    """How many brief blocks S tokens fill."""
    return max(0, (S - length) // stride + 1)


def cut(z: Float[Tensor, "B G S D"], length: int, stride: int) -> Float[Tensor, "B G n l D"]:
    """The tokens of each complete brief block; exported, with one or more behind them that nobody sees."""
    S = z.shape[2]
    if exporting():
        at = torch.arange(S // stride + 1, device=z.device)[:, None] * stride
        return F.pad(z, (0, 0, 0, 2 * length))[:, :, at + torch.arange(length, device=z.device)]
    if length > S:
        return z.new_zeros(*z.shape[:2], 0, length, z.shape[3])
    return z.unfold(2, length, stride).mT


def mean(z: Float[Tensor, "B G n l D"], real: Bool[Tensor, "B 1 n l 1"] | None = None) -> Float[Tensor, "B G n D"]:
    """Of the real tokens of each block, in at least fp32."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    if real is None:
        return wide.mean(3).to(z.dtype)
    return (wide.masked_fill(~real, 0).sum(3) / real.sum(3).clamp(min=1)).to(z.dtype)


class BlockMLP(nn.Module):
    """phi: places within the block are added, and one hidden layer makes one vector of all its tokens.

    Shapes: (B, G, n, l, D), real (B, 1, n, l, 1) -> (B, G, n, D).
    """

    def __init__(self, num_kv_heads: int, length: int, head_dim: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(num_kv_heads, length, head_dim))
        width = length * head_dim
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, head_dim)

    def forward(
        self, z: Float[Tensor, "B G n l D"], real: Bool[Tensor, "B 1 n l 1"] | None = None
    ) -> Float[Tensor, "B G n D"]:
        z = z + self.positions.unsqueeze(1).to(z.dtype)
        z = z if real is None else z.masked_fill(~real, 0)
        return self.outer(self.inner(z.flatten(3)).relu())


@torch.no_grad()
def chosen_blocks(
    q: Float[Tensor, "B H T D"], brief: Brief, S: int, *, block: int, count: int
) -> Bool[Tensor, "B G T n"]:
    """Which blocks of S keys each group of heads reads in full: the first, its own, the one before, and the best.

    S is where the last query stands, and the one before it is a token earlier, and so on.
    """
    (B, H, T, D), G = q.shape, brief.k.shape[1]
    n = S // block + 1 if exporting() else -(-S // block)
    j = torch.arange(n, device=q.device)
    # Brief blocks that overlap block j: the first of them, and how many there may be.
    first = (j * block - brief.length) // brief.stride + 1
    most = -(-brief.length // brief.stride) + -(-block // brief.stride) - (block % brief.stride == 0)
    chosen = []
    rows = torch.arange(T, device=q.device)
    if not exporting() and n <= count:  # all that there are
        own = (rows + S - T) // block
        return (j <= own[:, None]).expand(B, G, -1, -1)
    for some in [rows] if exporting() else rows.split(max(1, PAIRS // max(1, B * H * brief.k.shape[2]))):
        i = some + S - T
        P = softmax(dots(q[:, :, some], brief.k) * D**-0.5, brief.seen(i)).unflatten(1, (G, H // G)).sum(2)
        P = F.pad(P, (0, 1))  # for blocks that are not there
        rank = P.new_zeros(B, G, i.shape[0], n)
        for c in range(most):
            at = first + c
            start = at * brief.stride
            over = torch.minimum(start + brief.length, (j + 1) * block) - torch.maximum(start, j * block)
            there = (at >= 0) & (at < brief.k.shape[2])
            rank = rank + P[..., torch.where(there, at, brief.k.shape[2])] * over.clamp(min=0)
        own = (i // block)[:, None]
        rank = rank.masked_fill((j == 0) | (j == own) | (j == own - 1), math.inf).masked_fill(j > own, -math.inf)
        chosen.append(among(rank, count) & (j <= own))
    return torch.cat(chosen, 2)


def read_in_full(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    tiles: Bool[Tensor, "B G T n"],
    *,
    block: int,
    count: int,
    mask: Mask,
) -> Float[Tensor, "B H T V"]:
    """Attention to the keys of chosen blocks; one query alone takes them out of all keys first."""
    check_inputs(q, k, v)
    (_, H, T, _), (_, G, S, _) = q.shape, k.shape
    if not exporting() and (tiles.shape[3] <= count or S == 0):  # all are chosen
        return attention(q, k, v, mask=mask)
    if exporting() or T != 1:
        return attention(q, k, v, mask=mask & Chosen(tiles.repeat_interleave(H // G, 1), T, S, (1, block)))
    best = tiles[:, :, 0].float().topk(count).indices.sort(-1).values
    at = (best[..., None] * block + torch.arange(block, device=q.device)).flatten(2)
    there = tiles[:, :, 0].gather(2, best).repeat_interleave(block, 2) & (at < S)
    at = at.clamp(max=S - 1)
    seen = mask.at(torch.arange(S - 1, S, device=q.device), torch.arange(S, device=q.device))
    there = there & seen[:, :, 0].expand(len(at), G, -1).gather(2, at)
    k, v = (z.gather(2, at[..., None].expand(-1, -1, -1, z.shape[3])) for z in (k, v))
    return attention(q, k, v, mask=there[:, :, None].repeat_interleave(H // G, 1))


def native_sparse_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    gates: Float[Tensor, "B H T 3"],
    brief: Brief,
    *,
    block: int,
    count: int,
    window: int,
    keep: Bool[Tensor, "B S"] | None = None,
    own: tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S V"]] | None = None,
) -> Float[Tensor, "B H T V"]:
    """The three branches of the last T of S tokens, each times its gate.

    Args:
        keep: True at real keys.
        own: keys and values of the window, where they are others.
    """
    check_inputs(q, k, v)
    S = k.shape[2]
    mask = causal() if keep is None else causal() & padding(keep)
    i = torch.arange(S - q.shape[2], S, device=q.device)
    in_brief = attention(q, brief.k, brief.v, mask=brief.seen(i))
    tiles = chosen_blocks(q.detach(), brief, S, block=block, count=count)
    in_full = read_in_full(q, k, v, tiles, block=block, count=count, mask=mask)
    begin = 0 if exporting() else max(0, S - q.shape[2] - window + 1)  # no query sees keys before it
    k, v = (z[:, :, begin:] for z in ((k, v) if own is None else own))
    mask = causal() & near(window) if keep is None else causal() & near(window) & padding(keep[:, begin:])
    in_window = attention(q, k, v, mask=mask)
    g = gates.to(q.dtype).unsqueeze(-2).unbind(-1)
    return g[0] * in_brief + g[1] * in_full + g[2] * in_window
