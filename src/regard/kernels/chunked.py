"""Exact attention in memory linear in T: query chunks, a running softmax over key chunks, recomputed in backward.

    for each query chunk:   m, n, d = -inf, 0, 0                                (maximum, numerator, denominator)
        for each key chunk:  s = q k^T + bias;   m' = max(m, max_j s);   c = exp(m - m')
                             n = c n + exp(s - m') v;   d = c d + sum_j exp(s - m')
        out = n / d

Rabe, Staats 2021, "Self-attention Does Not Need O(n^2) Memory", https://arxiv.org/abs/2112.05682, sections 2-4 and
figure 1.
Differs from the paper: only query chunks are checkpointed, not each key chunk inside them, which costs memory linear
in S for one query chunk at a time; key chunks that no query of a chunk may see are skipped; any additive bias, and
any stage that needs whole rows (entmax, CoPE, convolutions over scores), runs too, the latter without key chunks.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.card import Card, Cost, Paper, register
from regard.kernels.problem import Problem, attend, biased_scores, combine, rectangle
from regard.kinds import HeadShape

TILE_BYTES = 32 * 2**20
"""Scores of one query chunk against all keys stay within this: in cache or near it, far below a T x S array."""
KEYS = 1024
"""Key chunk."""


def why_not(p: Problem) -> list[str]:
    """It runs every stage."""
    return []


def run(p: Problem) -> Tensor:
    """(B, H, T, V)."""
    B, H, _, T, S = p.shape
    size = max(16, min(1024, TILE_BYTES // max(1, 4 * B * H * S)))
    if T == 0:
        return attend(p, slice(0, 0), slice(0, S))
    recompute = torch.is_grad_enabled() and T > size
    outs = []
    for start in range(0, T, size):
        rows = slice(start, min(start + size, T))
        # Dropout is the only randomness; without it there is no generator state worth saving.
        args = (p, rows, key_range(p, rows))
        outs.append(
            checkpoint(_chunk, *args, use_reentrant=False, preserve_rng_state=p.dropout > 0)
            if recompute
            else _chunk(*args)
        )
    return torch.cat(outs, 2)


def key_range(p: Problem, rows: slice) -> slice:
    """The keys that these rows may reach at all, as the mask's bounds tell."""
    S = p.k.shape[2]
    if p.mask is None:
        return slice(0, S)
    offset = S - p.q.shape[2]  # both counted from the first key handed in
    first, last = max(0, rows.start - p.halo) + offset, rows.stop - 1 + offset
    start = 0 if p.mask.reach is None else max(0, first - p.mask.reach + 1)
    stop = min(S, last + 1) if p.mask.is_causal else S
    return slice(min(start, S), max(stop, min(start, S)))


def _chunk(p: Problem, rows: slice, keys: slice) -> Tensor:
    whole = p.dropout > 0 or p.score_mix is not None or p.weight_mix is not None or p.position_values
    if whole or p.normalizer is not None or any(s.sees == "rows" for s in p.stages) or keys.stop - keys.start <= KEYS:
        return attend(p, rows, keys)
    return _online(p, rows, keys)


def _online(p: Problem, rows: slice, keys: slice) -> Tensor:
    wide = torch.promote_types(p.q.dtype, torch.float32)
    shape = (*p.q.shape[:2], rows.stop - rows.start, 1)
    top = p.q.new_full(shape, -math.inf, dtype=wide)
    numerator, denominator = p.q.new_zeros((*shape[:3], p.v.shape[3]), dtype=wide), p.q.new_zeros(shape, dtype=wide)
    for start in range(keys.start, keys.stop, KEYS):
        part = slice(start, min(start + KEYS, keys.stop))
        tile = rectangle(p, rows, part)
        scores = biased_scores(p, tile, rows, part)
        if tile.allowed is not None:
            scores = scores.masked_fill(~tile.allowed, -math.inf)
        # The maximum only keeps exp in range; it cancels, so no gradient need pass through it.
        new = torch.maximum(top, scores.detach().amax(-1, keepdim=True))
        safe = torch.where(new == -math.inf, 0.0, new)
        weights, keep = (scores - safe).exp(), (top - safe).exp()
        numerator = keep * numerator + combine(weights, p.v[:, :, part])
        denominator = keep * denominator + weights.sum(-1, keepdim=True)
        top = new
    alive = denominator > 0
    return torch.where(alive, numerator / torch.where(alive, denominator, 1.0), 0.0).to(p.v.dtype)


def _slots(shape: HeadShape) -> dict[str, object]:
    return {"kernel": "chunked"}


CARD = register(
    Card(
        name="memory_efficient",
        family="kernels",
        gist="exact softmax attention in memory linear in T, by chunks with a running softmax",
        equation="out = n / d;  n = sum_j exp(s_j - m) v_j,  d = sum_j exp(s_j - m),  m = max_j s_j,  chunk by chunk",
        paper=Paper(
            "Self-attention Does Not Need O(n^2) Memory", "Rabe, Staats", 2021, "2112.05682", "sections 2-4, figure 1"
        ),
        slots=_slots,
        traits=frozenset({"normalised", "nonnegative", "linear_in_values", "position_free", "head_independent"}),
        cost=Cost("2*B*H*T*S*D", "2*S*G*D"),
        claim="at T = 16384 many times less memory than the full score matrix: `python -m benchmarks.memory`",
        differs=(
            "query chunks are checkpointed, key chunks are not; key chunks that nobody may see are skipped",
        ),
        verified="equation",
    )
)
