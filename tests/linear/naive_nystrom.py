"""Nystrom attention (Xiong et al. 2021, arXiv 2102.03902), by loops."""

import math

import torch
from torch import Tensor


def _softmax(scores: list[Tensor], allowed: list[bool]) -> list[Tensor]:
    """Over the allowed entries; the others get 0."""
    kept = [float(s.detach()) for s, a in zip(scores, allowed, strict=True) if a]
    zero = torch.zeros((), dtype=torch.float64)
    if not kept:
        return [zero for _ in scores]
    top = max(kept)
    e = [torch.exp(s - top) if a else zero for s, a in zip(scores, allowed, strict=True)]
    total = sum(e)
    return [x / total for x in e]


def naive_nystrom(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_landmarks: int,
    *,
    iterations: int = 6,
    init: str = "exact",
    conv: Tensor | None = None,
    keep: Tensor | None = None,
    zero_padding: bool = False,
) -> Tensor:
    """q, k (B,H,T,D), v (B,H,T,V) with T a multiple of num_landmarks -> (B,H,T,V), float64.

    q and k come unscaled; each is multiplied by D^(-1/4). conv (H,1,K,1), K odd: depthwise over positions.
    init: "exact" divides A^T by the largest column sum of each (batch, head) matrix, "original" by the largest over
    all batches and heads. keep (B,T), True = a real token: hides keys from the landmarks' rows (third factor) and, with
    `zero_padding`, q and k (and v of the convolution) of other tokens are 0 before the landmarks are formed.
    num_landmarks == T is plain softmax attention (plus the convolution).
    """
    q, k, v = q.double(), k.double(), v.double()
    (B, H, T, D), V, m = q.shape, v.shape[3], num_landmarks
    scale = D**-0.25
    q, k, v_conv = q * scale, k * scale, v
    if keep is not None and zero_padding:
        real = keep[:, None, :, None].double()
        q, k, v_conv = q * real, k * real, v * real
    seen = [[keep is None or bool(keep[b, j]) for j in range(T)] for b in range(B)]
    outs = torch.zeros(B, H, T, V, dtype=torch.float64)
    pieces: dict[tuple[int, int], list[Tensor]] = {}
    if m != T:
        segment = T // m
        for b in range(B):
            for h in range(H):
                q_land = [sum(q[b, h, i * segment + n] for n in range(segment)) / segment for i in range(m)]
                k_land = [sum(k[b, h, i * segment + n] for n in range(segment)) / segment for i in range(m)]
                every = [True] * m
                left = [_softmax([q[b, h, t] @ k_land[j] for j in range(m)], every) for t in range(T)]
                middle = [_softmax([q_land[i] @ k_land[j] for j in range(m)], every) for i in range(m)]
                right = [_softmax([q_land[i] @ k[b, h, j] for j in range(T)], seen[b]) for i in range(m)]
                pieces[b, h] = [torch.stack([torch.stack(row) for row in rows]) for rows in (left, middle, right)]
        column_sums = {at: middle.abs().sum(0).max() for at, (_, middle, _) in pieces.items()}
        largest = max(column_sums.values(), key=lambda z: float(z.detach())) if column_sums else None
    for b in range(B):
        for h in range(H):
            if m == T:
                weights = []
                for t in range(T):
                    weights.append(torch.stack(_softmax([q[b, h, t] @ k[b, h, j] for j in range(T)], seen[b])))
                outs[b, h] = torch.stack(weights) @ v[b, h]
            else:
                left, middle, right = pieces[b, h]
                one = torch.eye(m, dtype=torch.float64)
                z = middle.T / (largest if init == "original" else column_sums[b, h])
                for _ in range(iterations):
                    az = middle @ z
                    z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
                outs[b, h] = left @ z @ (right @ v[b, h])
            if conv is not None:
                taps = conv[h, 0, :, 0].double()
                K = len(taps)
                for t in range(T):
                    for j in range(K):
                        at = t + j - K // 2
                        if 0 <= at < T:
                            outs[b, h, t] = outs[b, h, t] + taps[j] * v_conv[b, h, at]
    assert math.isfinite(float(outs.detach().sum()))
    return outs
