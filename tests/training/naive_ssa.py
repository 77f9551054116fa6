"""Stochastically subsampled attention for a given permutation of the sources, written out with loops."""

import math

import torch
from torch import Tensor


def naive_ssa_keys(N: int, permutation: list[int], *, kept: int, local: bool) -> list[list[int]]:
    """Which sources each target may read, N lists of source indices.

    Unbiased: the first `kept` of the shuffled sources, for every target. Locally biased: the shuffled list is cut into
    windows of `kept`; target i reads window floor(i / kept) of it (the last window may be short).
    """
    if not local:
        return [permutation[:kept] for _ in range(N)]
    return [permutation[(i // kept) * kept : (i // kept + 1) * kept] for i in range(N)]


def naive_ssa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    permutation: list[int],
    keep: Tensor | None = None,
    *,
    kept: int,
    local: bool,
    causal: bool = False,
    own: bool = False,
) -> Tensor:
    """q, k (B, H, N, D), v (B, H, N, V), one permutation of 0 .. N - 1 for all samples and heads,
    keep (B, N) -> (B, H, N, V).

    Softmax over the kept sources alone, scale 1/sqrt(D), no factor for those left out. `causal`: by ORIGINAL positions,
    source <= target. `own`: the target's own source is always kept. A row with nothing to read gives 0.
    """
    B, H, N, D = q.shape
    readable = naive_ssa_keys(N, permutation, kept=kept, local=local)
    samples = []
    for b in range(B):
        heads = []
        for h in range(H):
            rows = []
            for i in range(N):
                chosen = set(readable[i]) | ({i} if own else set())
                seen = [j for j in sorted(chosen) if (keep is None or bool(keep[b, j])) and not (causal and j > i)]
                y = v.new_zeros(v.shape[-1])
                if seen:
                    logits = [torch.dot(q[b, h, i], k[b, h, j]) / math.sqrt(D) for j in seen]
                    largest = max(float(z) for z in logits)
                    total = sum(((z - largest).exp() for z in logits), q.new_zeros(()))
                    for z, j in zip(logits, seen, strict=True):
                        y = y + (z - largest).exp() / total * v[b, h, j]
                rows.append(y)
            heads.append(torch.stack(rows))
        samples.append(torch.stack(heads))
    return torch.stack(samples)
