"""Exact attention over the blocks that a mask (or a selector) leaves, and no others.

Plain softmax gathers the key blocks of all query blocks that see equally many, and runs each such bucket as one batch
of torch's fused kernel. With any other stage (that needs no other query rows), the query blocks go one after another.
Blocks that hold no allowed pair cost nothing.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.kernels import sdpa
from regard.kernels.cost import MASKED, Cost, asked, checked, formed, passed, products
from regard.kernels.problem import Keys, Problem, attend, nothing
from regard.masks import BlockLayout, Mask
from regard.masks.algebra import And
from regard.masks.content import remembered
from regard.masks.layout import within
from regard.masks.selection import Chosen

BLOCK = 128
SMALLEST = 16
"""Blocks of fewer queries or keys are not worth a call each."""
MANY = 128
"""So many queries in a block are worth gathering single keys for."""
GATHER_BYTES = 64 * 2**20
"""Keys and values gathered at once stay within this."""


def block_of(mask: Mask) -> tuple[int, int]:
    """The blocks to cut this mask into: its own grain where it has one, else `BLOCK`."""
    q, k = mask.grain or (BLOCK, BLOCK)
    if q >= MANY:
        return q, k
    return q if q >= SMALLEST else BLOCK, k if k >= SMALLEST else BLOCK


def why_not(p: Problem) -> list[str]:
    """It needs a mask to take blocks from, and rows that can be computed a block at a time."""
    reasons = []
    if p.mask is None:
        reasons.append("no mask, so there are no empty blocks to leave out")
    if p.halo:
        reasons.append(f"a stage reads {p.halo} earlier query rows, which may need other key blocks")
    reasons += [
        f"{name} {type(mix).__name__} reads neighbouring keys, of which some may be left out"
        for name, mix in p.mixes
        if mix.sees == "rows"
    ]
    if p.first_key:
        reasons.append("the cache has dropped keys already; what is left is dense")
    return reasons


def run(p: Problem, layout: BlockLayout | None = None) -> Tensor:
    """(B, H, T, V). The layout is the mask's own unless a selector hands in a smaller one."""
    T, S = p.shape[3:]
    if p.q.is_meta:
        return nothing(p, *p.q.shape[:3], p.v.shape[3])
    if layout is None:
        assert p.mask is not None
        layout = _layout(p.mask, T, S, block_of(p.mask))
    if T == 0 or S == 0:
        return attend(p, slice(0, T), slice(0, S))
    if not p.stages and p.bias is None:
        return _buckets(p, layout)
    # Stages hold parameters per head and can't be cut along heads: all heads take the union of their blocks.
    return _rows(p, layout, layout.to_dense_blocks().any(1).any(0), layout.to_dense_full().all(1).all(0))


def cost(p: Problem) -> Cost:
    """The stored blocks of each head; with stages, those that any head stores."""
    B, H, _, T, S = p.shape
    bq, bk = (BLOCK, BLOCK) if p.mask is None else block_of(p.mask)
    found = facts(p, bq, bk)
    words = f"{found.density:.0%} of the blocks hold an allowed pair"
    if p.stages or p.bias is not None:
        pairs, n = T * S * found.union, -(-T // bq)
        fusable = not sdpa.why_not(p)
        traffic = B * H * pairs * (formed(p) if fusable else passed(p))
        how = "fused" if fusable else "unfused"
        return Cost(products(p, pairs), traffic, 60 + 80 * n, words, checked(p), how)
    pairs = T * S * found.density
    gathered = 3.0 * pairs / bq * (p.q.shape[3] + p.v.shape[3]) * p.q.element_size()
    each = MASKED if p.mask is None else asked(p.mask) + MASKED
    traffic = B * H * (gathered + each * found.partly * pairs)
    return Cost(products(p, pairs), traffic, 120 + 60 * found.buckets, words, streamed=2 * checked(p))


@remembered(16)
def _layout(mask: Mask, T: int, S: int, block: tuple[int, int]) -> BlockLayout:
    return mask.layout(T, S, block=block)


@dataclass(frozen=True)
class Facts:
    """What a layout says about the work."""

    density: float
    """Share of blocks stored."""
    union: float = 1.0
    """Share of blocks that any batch row or head stores."""
    partly: float = 1.0
    """Share of the stored blocks in which some pair is masked."""
    buckets: int = 1
    """Different counts of blocks in a row."""


def facts(p: Problem, bq: int, bk: int) -> Facts:
    """As the layout tells; all blocks where finding out would cost more than it could save."""
    T, S = p.q.shape[2], p.k.shape[2]
    if p.mask is None:
        return Facts(1.0, partly=0.0)
    if T < 4 * BLOCK or S == 0 or torch.compiler.is_compiling():
        return Facts(1.0, buckets=-(-T // bq))
    return _made_facts(p.mask, T, S, (bq, bk))


@remembered(64)
def _made_facts(mask: Mask, T: int, S: int, block: tuple[int, int]) -> Facts:
    layout = _layout(mask, T, S, block)
    count = layout.row_ptr.diff()
    union = layout.block_density
    if layout.shape[:2] != (1, 1):
        union = float(layout.to_dense_blocks().any(1).any(0).float().mean())
    partly = 1.0 - float(layout.full.float().mean()) if layout.num_blocks else 0.0
    return Facts(layout.block_density, union, partly, len(count.unique()))


def _buckets(p: Problem, layout: BlockLayout) -> Tensor:
    """Plain softmax: all query blocks that see the same number of key blocks run as one batch."""
    (B, H, G, T, S), (Bm, Hm, nq, nk) = p.shape, layout.shape
    bq, bk = within(layout.block, T, S)
    D, V = p.q.shape[3], p.v.shape[3]
    cols, full = layout.cols.to(p.q.device), layout.full.to(p.q.device)
    # One item for each (batch row, head, query block): where its columns start, and how many there are.
    item = torch.arange(B * H * nq, device=p.q.device)
    b, h, r = item // (H * nq), item // nq % H, item % nq
    row = ((b % Bm) * Hm + h % Hm) * nq + r
    ptr = layout.row_ptr.to(p.q.device)
    start, count = ptr[row], ptr[row + 1] - ptr[row]
    full = full & (cols < S // bk)  # a ragged last block is filled up with keys that are none
    whole = F.pad(full.cumsum(0), (1, 0))[ptr]
    plain = whole[row + 1] - whole[row] == count
    q = F.pad(p.q, (0, 0, 0, nq * bq - T)).reshape(B * H * nq, bq, D)
    # Gradients of a block's keys are summed over all query blocks that see it: in float32, though keys are narrower.
    trained = torch.is_grad_enabled() and (p.k.requires_grad or p.v.requires_grad)
    wide = torch.promote_types(q.dtype, torch.float32) if trained else q.dtype
    k, v = (F.pad(z, (0, 0, 0, nk * bk - S)).reshape(B * G * nk, bk, -1).to(wide) for z in (p.k, p.v))
    source = (b * G + h // (H // G)) * nk  # the first block of the item's keys

    def attend_to(items: Tensor, n: int, masked: bool) -> Tensor:
        chosen = cols[start[items, None] + torch.arange(n, device=items.device)]
        at = (source[items, None] + chosen).flatten()
        keys, values = (z.index_select(0, at).view(len(items), 1, n * bk, -1).to(q.dtype) for z in (k, v))
        mask = _allowed(p, b[items], h[items], r[items], chosen, (bq, bk)) if masked else None
        queries = q.index_select(0, items).unsqueeze(1)
        if n * bk > sdpa.most_keys(p) and q.is_cpu and q.dtype == torch.float32:  # whose sums would lose 1e-5
            queries, keys, values = queries.double(), keys.double(), values.double()
        out = F.scaled_dot_product_attention(queries, keys, values, mask, p.dropout, scale=p.scale).squeeze(1)
        return out.to(q.dtype)

    order, outs = [], []
    for n in count.unique().tolist():
        for masked in (False, True):
            items = ((count == n) & (plain != masked)).nonzero().flatten()
            if n == 0:
                outs.append(nothing(p, len(items), bq, V))
                order.append(items)
                continue
            size = max(1, GATHER_BYTES // (n * bk * (D + V) * q.element_size()))
            for some in items.split(size):
                if not len(some):
                    continue
                if torch.is_grad_enabled():
                    # Gathered keys and values are several times the inputs: gathered again in backward instead.
                    out = checkpoint(attend_to, some, n, masked, use_reentrant=False, preserve_rng_state=p.dropout > 0)
                else:
                    out = attend_to(some, n, masked)
                outs.append(out)
                order.append(some)
    out = torch.cat(outs)[torch.cat(order).argsort()]
    return out.view(B, H, nq * bq, V)[:, :, :T]


def _allowed(p: Problem, b: Tensor, h: Tensor, r: Tensor, chosen: Tensor, block: tuple[int, int]) -> Tensor:
    """(items, 1, bq, n bk) bool: the mask inside these blocks."""
    (bq, bk), (T, S) = block, (p.q.shape[2], p.k.shape[2])
    i = (r[:, None, None] * bq + torch.arange(bq, device=r.device)[:, None]).clamp(max=T - 1) + S - T
    j = (chosen[:, :, None] * bk + torch.arange(bk, device=r.device)).flatten(1)[:, None]
    allowed = (j < S).expand(-1, bq, -1)
    for mask in p.mask.parts if isinstance(p.mask, And) else [p.mask]:
        # What chose these very blocks allows all of a stored one.
        chose = isinstance(mask, Chosen) and (within(mask.block, T, S), mask.T, mask.S) == (block, T, S)
        if mask is not None and not chose:
            row, head = b[:, None, None] % mask.batch, h[:, None, None] % mask.heads
            allowed = allowed & mask(row, head, i, j.clamp(max=S - 1))
    return allowed[:, None]


def _rows(p: Problem, layout: BlockLayout, blocks: Tensor, full: Tensor) -> Tensor:
    """All query blocks, one after another; `blocks` and `full` are (nq, nk) bool."""
    (bq, bk), T, S = layout.block, p.q.shape[2], p.k.shape[2]
    fusable = not sdpa.why_not(p)
    outs = []
    for r, (row, row_full) in enumerate(zip(blocks, full, strict=True)):
        rows = slice(r * bq, min((r + 1) * bq, T))
        cols = row.nonzero().flatten()
        keys = _keys(cols, bk, S)
        here = replace(p, mask=None) if len(cols) and bool(row_full[cols].all()) else p
        run = sdpa.fused if fusable and len(cols) else attend
        if torch.is_grad_enabled() and (p.stages or p.bias is not None):
            # Or every block's scores or bias would wait for backward.
            outs.append(checkpoint(run, here, rows, keys, use_reentrant=False, preserve_rng_state=p.dropout > 0))
        else:
            outs.append(run(here, rows, keys))
    return torch.cat(outs, 2)


def _keys(cols: Tensor, bk: int, S: int) -> Keys:
    """The keys of these blocks: a slice where the blocks are neighbours, else their indices."""
    if len(cols) == 0:
        return slice(0, 0)
    first, last = int(cols[0]), int(cols[-1])
    if last - first + 1 == len(cols):
        return slice(first * bk, min((last + 1) * bk, S))
    keys = (cols[:, None] * bk + torch.arange(bk, device=cols.device)).flatten()
    return keys[keys < S]
