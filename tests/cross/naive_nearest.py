"""Rank against heads, written with loops by somebody who saw the formulas only, and neither code nor tests."""

import math

import torch
from torch import Tensor


def _may(allowed, b: int, i: int, j: int) -> bool:
    if allowed is None:
        return True
    allowed = torch.as_tensor(allowed)
    return bool(allowed[i, j] if allowed.dim() == 2 else allowed[b, i, j])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return sum(a[d] * b[d] for d in range(a.shape[0]))


def _matvec(M: Tensor, vector: Tensor) -> Tensor:
    return torch.stack([_dot(M[r], vector) for r in range(M.shape[0])])


def _softmax(scores: list, seen: list) -> list:
    live = [scores[j] for j in range(len(scores)) if seen[j]]
    if not live:
        return [s.new_zeros(()) for s in scores]
    top = max(float(s.detach()) for s in live)
    total = sum(torch.exp(s - top) for s in live)
    return [torch.exp(s - top) / total if seen[j] else s.new_zeros(()) for j, s in enumerate(scores)]


def _one_hot(scores: list, seen: list) -> list:
    best = None
    for j, s in enumerate(scores):
        if seen[j] and (best is None or float(s.detach()) > float(scores[best].detach())):
            best = j
    return [s.new_ones(()) if j == best else s.new_zeros(()) for j, s in enumerate(scores)]


def low_rank_weights(queries: Tensor, keys: Tensor, Q: Tensor, K: Tensor, hard: bool = False, allowed=None) -> Tensor:
    """A (B, H, T, S)."""
    B, T, S = queries.shape[0], queries.shape[1], keys.shape[1]
    H, r = Q.shape[0], Q.shape[1]
    out = []
    for b in range(B):
        heads = []
        for h in range(H):
            ks = [_matvec(K[h], keys[b, j]) for j in range(S)]
            rows = []
            for i in range(T):
                qi = _matvec(Q[h], queries[b, i])
                scores = [_dot(qi, ks[j]) / math.sqrt(r) for j in range(S)]
                seen = [_may(allowed, b, i, j) for j in range(S)]
                rows.append(torch.stack((_one_hot if hard else _softmax)(scores, seen)))
            heads.append(torch.stack(rows))
        out.append(torch.stack(heads))
    return torch.stack(out)


def low_rank_attention(
    queries: Tensor, keys: Tensor, Q: Tensor, K: Tensor, VO: Tensor, hard: bool = False, allowed=None
) -> Tensor:
    """out_e = sum_h sum_j A_ij^h sum_d x_jd VO_h[d, e], (B, T, M)."""
    A = low_rank_weights(queries, keys, Q, K, hard, allowed)
    B, H, T, S = A.shape
    M = keys.shape[2]
    out = []
    for b in range(B):
        rows = []
        for i in range(T):
            total = keys.new_zeros(VO.shape[2])
            for h in range(H):
                for j in range(S):
                    value = [sum(keys[b, j, d] * VO[h, d, e] for d in range(M)) for e in range(VO.shape[2])]
                    total = total + A[b, h, i, j] * torch.stack(value)
            rows.append(total)
        out.append(torch.stack(rows))
    return torch.stack(out)


def nearest(queries: Tensor, keys: Tensor) -> Tensor:
    """The key with the largest inner product."""
    B, T, S = *queries.shape[:2], keys.shape[1]
    found = []
    for b in range(B):
        best = [max(range(S), key=lambda j: (float(_dot(queries[b, i], keys[b, j])), -j)) for i in range(T)]
        found.append(torch.stack([keys[b, j] for j in best]))
    return torch.stack(found)


def farthest(keys: Tensor) -> Tensor:
    """Every key asks for the key with the smallest inner product."""
    B, S = keys.shape[:2]
    found = []
    for b in range(B):
        best = [min(range(S), key=lambda j: (float(_dot(keys[b, i], keys[b, j])), j)) for i in range(S)]
        found.append(torch.stack([keys[b, j] for j in best]))
    return torch.stack(found)


def loss(answer: Tensor, target: Tensor) -> Tensor:
    """Mean over batch and queries of |y^ - y|^2."""
    B, T, M = answer.shape
    return sum((answer[b, i, d] - target[b, i, d]) ** 2 for b in range(B) for i in range(T) for d in range(M)) / (B * T)


def rank_one(q: Tensor, k: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (H, M), a (H) -> (Q, K, VO), VO_h = a_h I."""
    H, M = q.shape
    zero = a.new_zeros(())
    maps = [[torch.stack([a[h] if d == e else zero for e in range(M)]) for d in range(M)] for h in range(H)]
    return q[:, None], k[:, None], torch.stack([torch.stack(rows) for rows in maps])


def normal_matrix(q: Tensor, k: Tensor) -> Tensor:
    """C_gh = 1/2 + (2 / pi^2) asin(q_g . q_h) asin(k_g . k_h) for unit q, k, two points, hard."""
    H = q.shape[0]

    def asin(a: Tensor, b: Tensor) -> Tensor:
        return torch.asin(torch.clamp(_dot(a, b), -1, 1))

    rows = [[0.5 + 2 / math.pi**2 * asin(q[g], q[h]) * asin(k[g], k[h]) for h in range(H)] for g in range(H)]
    return torch.stack([torch.stack(row) for row in rows])


def right_hand_side(q: Tensor, k: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """b_h: mean over the given queries and keys of (hard output of head h) . target."""
    target = nearest(queries, keys)
    B, T, _ = queries.shape
    out = []
    for h in range(q.shape[0]):
        one = q.new_ones(1)
        picked = low_rank_attention(queries, keys, *rank_one(q[h : h + 1], k[h : h + 1], one), True)
        out.append(sum(_dot(picked[b, i], target[b, i]) for b in range(B) for i in range(T)) / (B * T))
    return torch.stack(out)


def expected_error(a: Tensor, b: Tensor, C: Tensor) -> Tensor:
    """1 - 2 b.a + a.C a."""
    return 1 - 2 * _dot(b, a) + _dot(a, _matvec(C, a))
