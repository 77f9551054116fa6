"""Agent attention (Han et al. 2023, arXiv 2312.08874), by loops; also its pooling, biases and convolution."""

import math

import torch
from torch import Tensor


def _softmax(scores: list[Tensor]) -> list[Tensor]:
    top = max(float(s.detach()) for s in scores)
    e = [torch.exp(s - top) for s in scores]
    total = sum(e)
    return [x / total for x in e]


def naive_agent(
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    bias_1: Tensor | None = None,
    bias_2: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """q (B,H,T,D), agents (B,H,n,D), k (B,H,S,D), v (B,H,S,V), bias_1 (H,n,S), bias_2 (H,T,n), keep (B,S) -> (B,H,T,V).

    va_a = sum_s softmax_s(agent_a . k_s / sqrt(D) + bias_1[a,s]) v_s;
    out_t = sum_a softmax_a(q_t . agent_a / sqrt(D) + bias_2[t,a]) va_a. Float64. No real key at all gives 0.
    """
    q, agents, k, v = (z.double() for z in (q, agents, k, v))
    (B, H, T, D), n, S, V = q.shape, agents.shape[2], k.shape[2], v.shape[3]
    outs = []
    for b in range(B):
        keys = [s for s in range(S) if keep is None or bool(keep[b, s])]
        for h in range(H):
            gathered = []
            for a in range(n):
                scores = []
                for s in keys:
                    score = agents[b, h, a] @ k[b, h, s] / math.sqrt(D)
                    scores.append(score if bias_1 is None else score + bias_1[h, a, s].double())
                weights = _softmax(scores) if keys else []
                value = torch.zeros(V, dtype=torch.float64)
                for w, s in zip(weights, keys, strict=True):
                    value = value + w * v[b, h, s]
                gathered.append(value)
            for t in range(T):
                scores = []
                for a in range(n):
                    score = q[b, h, t] @ agents[b, h, a] / math.sqrt(D)
                    scores.append(score if bias_2 is None else score + bias_2[h, t, a].double())
                outs.append(sum(w * g for w, g in zip(_softmax(scores), gathered, strict=True)))
    return torch.stack(outs).reshape(B, H, T, V) if outs else torch.zeros(B, H, T, V, dtype=torch.float64)


def naive_pool(x: Tensor, h: int, w: int, p: int) -> Tensor:
    """Adaptive average pooling of x (B,h*w,M), a row-major map, to (B,p*p,M)."""
    x = x.double()
    B, _, M = x.shape
    cells = []
    for b in range(B):
        for i in range(p):
            for j in range(p):
                rows = range((i * h) // p, -((-(i + 1) * h) // p))
                columns = range((j * w) // p, -((-(j + 1) * w) // p))
                inside = [x[b, r * w + c] for r in rows for c in columns]
                cells.append(sum(inside) / len(inside))
    return torch.stack(cells).reshape(B, p * p, M)


def naive_upsample(z: Tensor, h: int, w: int) -> Tensor:
    """Bilinear (..., y, x) -> (..., h, w): half-pixel centres, edges clamped, no antialias."""
    z = z.double()
    y, x = z.shape[-2:]

    def sources(n: int, size: int) -> list[tuple[int, int, float]]:
        found = []
        for i in range(n):
            at = max((i + 0.5) * size / n - 0.5, 0.0)
            low = min(int(at), size - 1)
            found.append((low, min(low + 1, size - 1), at - low))
        return found

    columns = sources(w, x)
    lines = []
    for r0, r1, fr in sources(h, y):
        cells = []
        for c0, c1, fc in columns:
            upper = (1 - fc) * z[..., r0, c0] + fc * z[..., r0, c1]
            lower = (1 - fc) * z[..., r1, c0] + fc * z[..., r1, c1]
            cells.append((1 - fr) * upper + fr * lower)
        lines.append(torch.stack(cells, -1))
    return torch.stack(lines, -2)


def naive_agent_biases(
    an: Tensor, na: Tensor, ah: Tensor, aw: Tensor, ha: Tensor, wa: Tensor, h: int, w: int
) -> tuple[Tensor, Tensor]:
    """an, na (H,n,y,x), ah (1,H,n,h,1), aw (1,H,n,1,w), ha (1,H,h,1,n), wa (1,H,1,w,n) -> (H,n,h*w), (H,h*w,n)."""
    H, n = an.shape[:2]
    up_an, up_na = naive_upsample(an, h, w), naive_upsample(na, h, w)
    first, second = [], []
    for e in range(H):
        for a in range(n):
            for i in range(h):
                for j in range(w):
                    first.append(up_an[e, a, i, j] + ah[0, e, a, i, 0] + aw[0, e, a, 0, j])
        for i in range(h):
            for j in range(w):
                for a in range(n):
                    second.append(up_na[e, a, i, j] + ha[0, e, i, 0, a] + wa[0, e, 0, j, a])
    return torch.stack(first).reshape(H, n, h * w), torch.stack(second).reshape(H, h * w, n)


def naive_depthwise(v: Tensor, weight: Tensor, bias: Tensor, h: int, w: int) -> Tensor:
    """3x3 depthwise cross-correlation of v (B,h*w,M), a row-major map, zero padding 1; weight (M,1,3,3), bias (M)."""
    v, weight = v.double(), weight.double()
    B, _, M = v.shape
    outs = []
    for b in range(B):
        for i in range(h):
            for j in range(w):
                total = bias.double()
                for di in (-1, 0, 1):
                    for dj in (-1, 0, 1):
                        if 0 <= i + di < h and 0 <= j + dj < w:
                            total = total + weight[:, 0, di + 1, dj + 1] * v[b, (i + di) * w + j + dj]
                outs.append(total)
    return torch.stack(outs).reshape(B, h * w, M)
