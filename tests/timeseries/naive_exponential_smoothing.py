"""ETSformer's exponential smoothing, its growth, level and damping layers, one time step at a time."""

import torch
from torch import Tensor


def naive_exponential_smoothing(v: Tensor, theta: Tensor, v0: Tensor) -> Tensor:
    """out_t = a out_{t-1} + (1 - a) v_t with out_{-1} = v0 and a = sigmoid(theta).

    v (B, L, H, D), theta (H) or (H, 1), v0 (H, D) -> (B, L, H, D).
    """
    B, L, H, _ = v.shape
    a = torch.sigmoid(theta.reshape(H))
    batch = []
    for b in range(B):
        heads = []
        for h in range(H):
            out, steps = v0[h], []
            for t in range(L):
                out = a[h] * out + (1 - a[h]) * v[b, t, h]
                steps.append(out)
            heads.append(torch.stack(steps))
        batch.append(torch.stack(heads, 1))
    return torch.stack(batch)


def naive_growth(
    z: Tensor, z0: Tensor, theta: Tensor, v0: Tensor, Win: Tensor, bin: Tensor, Wout: Tensor, bout: Tensor
) -> Tensor:
    """Multi-head exponential smoothing of differences: z (B, L, M), z0 and v0 (H, D), theta (H) -> (B, L + 1, M).

    Index 0 of the output is the initial growth; output[:, 1:] stands beside z.
    """
    B, L, _ = z.shape
    H, D = z0.shape
    batch = []
    for b in range(B):
        previous, differences = z0, []
        for t in range(L):
            u = (Win @ z[b, t] + bin).reshape(H, D)
            differences.append(u - previous)
            previous = u
        smooth = naive_exponential_smoothing(torch.stack(differences)[None], theta, v0)[0]
        batch.append(torch.stack([Wout @ g.reshape(H * D) + bout for g in (v0, *smooth)]))
    return torch.stack(batch)


def naive_level(
    level: Tensor,
    growth: Tensor,
    season: Tensor,
    theta: Tensor,
    v0: Tensor,
    Wg: Tensor,
    bg: Tensor,
    Ws: Tensor,
    bs: Tensor,
    *,
    reading: str = "recursion",
) -> Tensor:
    """The level layer: level (B, L, C), growth one step behind and season (B, L, M), theta and v0 (C) -> (B, L, C).

    reading="recursion": E_t = (1 - a)(level_t - S_t) + a (E_{t-1} + G_t), E_{-1} = v0, a = sigmoid(theta).
    reading="code": the smoothing of level - S, plus a^{L - t} G_t.
    """
    B, L, C = level.shape
    a = torch.sigmoid(theta.reshape(C))
    batch = []
    for b in range(B):
        smooth, steps = v0.reshape(C), []
        for t in range(L):
            G, S = Wg @ growth[b, t] + bg, Ws @ season[b, t] + bs
            if reading == "recursion":
                smooth = (1 - a) * (level[b, t] - S) + a * (smooth + G)
                steps.append(smooth)
            else:
                smooth = (1 - a) * (level[b, t] - S) + a * smooth
                steps.append(smooth + a ** (L - t) * G)
        batch.append(torch.stack(steps))
    return torch.stack(batch)


def naive_damping(growth: Tensor, theta: Tensor, horizon: int) -> Tensor:
    """out_h = growth * sum_{i = 1 .. h} gamma^i, h = 1 .. horizon: growth (B, 1, M), theta (H) -> (B, horizon, M)."""
    B, _, M = growth.shape
    H = theta.numel()
    gamma = torch.sigmoid(theta.reshape(H))
    batch = []
    for b in range(B):
        steps = []
        for n in range(1, horizon + 1):
            factor = torch.stack([sum(gamma[h] ** i for i in range(1, n + 1)) for h in range(H)])
            steps.append((growth[b, 0].reshape(H, M // H) * factor[:, None]).reshape(M))
        batch.append(torch.stack(steps))
    return torch.stack(batch)
