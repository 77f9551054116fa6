"""Exact softmax attention over a band of keys: all blocks of queries at once, on views of keys and values.

A block of C queries may see C + back + ahead neighbouring keys. Neighbouring blocks' keys overlap, and strides show
them without a copy, so torch's fused kernel runs over all blocks as if they were heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.kernels.cost import MASKED, Cost, asked, checked, io, products
from regard.kernels.problem import Problem, nothing

SMALLEST, LARGEST = 32, 128
"""Queries in a block. More waste less of each key read but compute more pairs that the mask forbids."""


def why_not(p: Problem) -> list[str]:
    """It needs a mask that bounds how far a query sees, one for all heads, and plain softmax."""
    reasons = []
    if p.mask is None or math.inf in p.mask.span:
        reasons.append("nothing bounds how far a query sees, back and ahead")
    elif p.mask.heads > 1:
        reasons.append("the mask differs by head")
    if p.stages or p.bias is not None:
        names = [type(s).__name__ for s in p.stages] + ["bias"] * (p.bias is not None)
        reasons.append(f"{', '.join(names)}: only plain softmax")
    if p.first_key:
        reasons.append("the cache has dropped keys already; what is left is dense")
    return reasons


def run(p: Problem) -> Tensor:
    """(B, H, T, V)."""
    (B, H, G, T, S), D, V = p.shape, p.q.shape[3], p.v.shape[3]
    back, ahead = reach(p)
    if -ahead > back or 0 in (B, T, S):
        return nothing(p, B, H, T, V)
    C, group = block(back + ahead + 1), H // G
    L, n, offset = C + back + ahead, -(-T // C), S - T
    # Block r holds queries r C .. and sees keys r C + offset - back ..; zeros stand where there are none.
    q = _filled(p.q, 0, n * C - T).reshape(B * G, group, n, C, D).transpose(1, 2).reshape(B * G, n, group * C, D)
    first = offset - back
    k, v = (_blocks(z, first, n, C, L) for z in (p.k, p.v))
    parts = []
    for rows, mask in _masks(p, n, C, L, first):
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
        bias = bias.repeat(1, 1, group, 1)
        if len(bias) > 1:
            bias = bias.repeat_interleave(G, 0)
        parts.append(F.scaled_dot_product_attention(q[:, rows], k[:, rows], v[:, rows], bias, p.dropout, scale=p.scale))
    out = torch.cat(parts, 1).reshape(B * G, n, group, C, V).transpose(1, 2)
    return out.reshape(B, H, n * C, V)[:, :, :T]


def cost(p: Problem) -> Cost:
    """Every block of C queries against its C + back + ahead keys."""
    assert p.mask is not None
    B, H, _, T, _ = p.shape
    keys = max(1, sum(reach(p)) + 1)
    C = block(keys)
    L, n = C + keys - 1, -(-T // C)
    # Blocks at the ends have masks of their own, all others share one where only i - j counts.
    masks = min(n, 1 + -(-2 * L // C)) if p.mask.is_shift_invariant else n * p.mask.batch
    traffic = masks * C * L * (asked(p.mask) + 16.0) + B * H * n * C * L * MASKED
    words = f"queries in blocks of {C}, {L} keys each"
    return Cost(products(p, n * C * L), traffic, 150, words, streamed=checked(p) + io(p))


def reach(p: Problem) -> tuple[int, int]:
    """How far back and ahead a query sees, of what is there: a window may be far wider than the sequence."""
    assert p.mask is not None
    (back, ahead), (_, _, _, T, S) = p.mask.span, p.shape
    return int(min(back, S - 1)), int(min(ahead, T - 1))


def block(keys: int) -> int:
    """Queries in a block for a band of so many keys: about a quarter, so that a fifth of the pairs is in vain."""
    return min(LARGEST, max(SMALLEST, 1 << (max(1, keys // 4) - 1).bit_length()))


def _blocks(z: Tensor, first: int, n: int, C: int, L: int) -> Tensor:
    """(B G, n, L, width): keys first + r C .. first + r C + L of each block r, zero where there are none."""
    S = z.shape[2]
    last = first + (n - 1) * C + L
    z = z[:, :, max(0, first) : max(0, last)]
    return _filled(z, max(0, -first), max(0, last - max(S, first, 0))).flatten(0, 1).unfold(1, L, C).mT


def _filled(z: Tensor, before: int, after: int) -> Tensor:
    """So many zero tokens before and after. F.pad would write everything twice, and copy where nothing is added."""
    zeros = [z.new_zeros(*z.shape[:2], n, z.shape[3]) for n in (before, after)]
    return torch.cat([zeros[0], z, zeros[1]], 2) if before or after else z


def _masks(p: Problem, n: int, C: int, L: int, first: int) -> list[tuple[slice, Tensor]]:
    """Runs of blocks with their masks, (B or 1, 1 or blocks, C, L): inner blocks share one where only i - j counts."""
    assert p.mask is not None
    T, S = p.q.shape[2], p.k.shape[2]
    device = p.q.device
    # Blocks [inner, outer) have all their queries and keys.
    inner = min(n, max(0, -(first // C)))
    outer = max(inner, min((S - L - first) // C + 1, T // C))
    spans = [slice(0, inner), slice(inner, outer), slice(outer, n)] if p.mask.is_shift_invariant else [slice(0, n)]
    zero, found = torch.zeros((), dtype=torch.long, device=device), []
    for span in spans:
        if span.start >= span.stop:
            continue
        shared = p.mask.is_shift_invariant and span.start == inner and span.stop == outer
        r = torch.arange(span.start, span.start + 1 if shared else span.stop, device=device)[:, None, None]
        t = r * C + torch.arange(C, device=device)[:, None]
        j = r * C + first + torch.arange(L, device=device)
        b = torch.arange(p.mask.batch, device=device)[:, None, None, None]
        # Outside, rules are asked about a pair at the rim instead: they may have tables of this very length.
        i_, j_ = (t + S - T, j) if shared else (t.clamp(max=T - 1) + S - T, j.clamp(0, S - 1))
        allowed = p.mask(b, zero, i_, j_) & (t < T) & (j >= 0) & (j < S)
        found.append((span, allowed.expand(p.mask.batch, -1, -1, -1)))
    return found
