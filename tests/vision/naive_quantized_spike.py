"""Quantised spike-driven attention (arXiv 2501.13492), with loops, by somebody who saw the formulas only.

A branch (q, k, v or output) is a dict of plain tensors: conv1 (C, C), step1 (C); bn1 = (gamma, beta, mean, var);
depth (C, 3, 3), step_depth (C); conv2 (C, C), step2 (C); bn2, bn3 (outer norm) as bn1. Functions with training=True
return the updated running statistics too. x: (B, C, Y, X).
"""

import math

import torch

EPS = 1e-5


def integer_spike(x, levels=4, gain=1.0):
    """gain/L floor(clamp(L x, 0, L) + 1/2); gradient gain where 0 < x < 1 strictly, else 0."""
    value = gain / levels * torch.floor(torch.clamp(levels * x.detach(), 0, levels) + 0.5)
    slope = torch.where((x.detach() > 0) & (x.detach() < 1), gain, 0.0).to(x.dtype)
    return value + slope * (x - x.detach())


def to_spikes(x, levels=4):
    """(levels, ...) binary trains with gain/levels * sum = integer_spike(x, levels, gain)."""
    count = torch.floor(torch.clamp(levels * x.detach(), 0, levels) + 0.5)
    return torch.stack([torch.where(count > n, 1.0, 0.0).to(x.dtype) for n in range(levels)])


def lsq(weight, step, bits=4):
    """w^ = a_o round(clamp(w / a_o, Qn, Qp)), one step per output channel (axis 0)."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = 1.0 / math.sqrt(weight.numel() * high)
    out = []
    for o in range(weight.shape[0]):
        a = step[o].detach() + scale * (step[o] - step[o].detach())
        ratio = weight[o] / a
        inside = (ratio.detach() >= low) & (ratio.detach() <= high)
        clamped = torch.where(inside, ratio, torch.clamp(ratio.detach(), low, high))
        rounded = torch.round(clamped.detach()) + (clamped - clamped.detach())
        out.append(a * rounded)
    return torch.stack(out)


def lsq_initial_step(weight, bits=4):
    """2 mean|w| / sqrt(Qp) for every output channel."""
    value = 2 * weight.detach().abs().mean() / math.sqrt(2 ** (bits - 1) - 1)
    return torch.stack([value] * weight.shape[0])


def conv1x1(x, weight, bias=None):
    """(B,C,Y,X), weight (O,C)."""
    B, C = x.shape[:2]
    return torch.stack(
        [
            torch.stack(
                [
                    sum(weight[o, c] * x[b, c] for c in range(C)) + (0.0 if bias is None else bias[o])
                    for o in range(weight.shape[0])
                ]
            )
            for b in range(B)
        ]
    )


def depthwise(x, weight):
    """(B,C,Y+2,X+2), weight (C,3,3), no padding (cross-correlation)."""
    B, C, Y, X = x.shape
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            torch.stack(
                                [
                                    sum(weight[c, u, w] * x[b, c, y + u, xx + w] for u in range(3) for w in range(3))
                                    for xx in range(X - 2)
                                ]
                            )
                            for y in range(Y - 2)
                        ]
                    )
                    for c in range(C)
                ]
            )
            for b in range(B)
        ]
    )


def batch_norm(x, bn, training=False, momentum=0.1):
    """-> (normalised, mean after, var after)."""
    gamma, beta, mean, var = bn
    B, C, Y, X = x.shape
    n = B * Y * X
    outs, means, variances = [], [], []
    for c in range(C):
        if training:
            m = sum(x[b, c, y, xx] for b in range(B) for y in range(Y) for xx in range(X)) / n
            v = sum((x[b, c, y, xx] - m) ** 2 for b in range(B) for y in range(Y) for xx in range(X)) / n
            means.append((1 - momentum) * mean[c] + momentum * m.detach())
            variances.append((1 - momentum) * var[c] + momentum * v.detach() * n / (n - 1))
        else:
            m, v = mean[c], var[c]
            means.append(m)
            variances.append(v)
        outs.append(torch.stack([(x[b, c] - m) / torch.sqrt(v + EPS) * gamma[c] + beta[c] for b in range(B)]))
    return (
        torch.stack([torch.stack([outs[c][b] for c in range(C)]) for b in range(B)]),
        torch.stack(means),
        torch.stack(variances),
    )


def bordered(x, bn_after):
    """one pixel of BN1's answer to a zero input, from running statistics, detached."""
    gamma, beta, mean, var = (t.detach() for t in bn_after)
    B, C, Y, X = x.shape
    constant = [beta[c] - mean[c] * gamma[c] / torch.sqrt(var[c] + EPS) for c in range(C)]
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            torch.stack(
                                [
                                    x[b, c, y, xx] if 0 <= y < Y and 0 <= xx < X else constant[c]
                                    for xx in range(-1, X + 1)
                                ]
                            )
                            for y in range(-1, Y + 1)
                        ]
                    )
                    for c in range(C)
                ]
            )
            for b in range(B)
        ]
    )


def rep(x, branch, bits=4, training=False):
    """Rep(x) -> (out, {"bn1": (mean, var), "bn2": (mean, var)} after)."""
    z, m1, v1 = batch_norm(conv1x1(x, lsq(branch["conv1"], branch["step1"], bits)), branch["bn1"], training)
    z = bordered(z, (branch["bn1"][0], branch["bn1"][1], m1, v1))
    z = depthwise(z, lsq(branch["depth"], branch["step_depth"], bits))
    z = conv1x1(z, lsq(branch["conv2"], branch["step2"], bits))
    z, m2, v2 = batch_norm(z, branch["bn2"], training)
    return z, {"bn1": (m1, v1), "bn2": (m2, v2)}


def rep_and_norm(x, branch, bits=4, training=False):
    z, after = rep(x, branch, bits, training)
    z, m3, v3 = batch_norm(z, branch["bn3"], training)
    return z, {**after, "bn3": (m3, v3)}


def tokens(x, H):
    """(B,C,Y,X) -> (B,H,N,D), head-major channels, n = y*X + x."""
    B, C, Y, X = x.shape
    D = C // H
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [torch.stack([x[b, h * D + d, y, xx] for d in range(D)]) for y in range(Y) for xx in range(X)]
                    )
                    for h in range(H)
                ]
            )
            for b in range(B)
        ]
    )


def untokens(o, Y, X):
    B, H, _, D = o.shape
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack([torch.stack([o[b, h, y * X + xx, d] for xx in range(X)]) for y in range(Y)])
                    for h in range(H)
                    for d in range(D)
                ]
            )
            for b in range(B)
        ]
    )


def attention_core(q, k, v, scale=0.25):
    """eq. 5: (B,H,N,D) -> scale * q (k^T v)."""
    B, H, N, D = q.shape
    out = []
    for b in range(B):
        heads = []
        for h in range(H):
            kv = [[sum(k[b, h, n, d] * v[b, h, n, e] for n in range(N)) for e in range(v.shape[3])] for d in range(D)]
            heads.append(
                torch.stack(
                    [
                        torch.stack(
                            [scale * sum(q[b, h, n, d] * kv[d][e] for d in range(D)) for e in range(v.shape[3])]
                        )
                        for n in range(N)
                    ]
                )
            )
        out.append(torch.stack(heads))
    return torch.stack(out)


def score_map(q, k, scale=0.25):
    B, H, N, D = q.shape
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            torch.stack(
                                [scale * sum(q[b, h, n, d] * k[b, h, m, d] for d in range(D)) for m in range(N)]
                            )
                            for n in range(N)
                        ]
                    )
                    for h in range(H)
                ]
            )
            for b in range(B)
        ]
    )


def attention(x, branch_q, branch_k, branch_v, branch_o, H, bits=4, levels=4, scale=0.25, training=False):
    """eq. 1 to 6 -> (y, running statistics after, by branch)."""
    Y, X = x.shape[2:]
    x0 = integer_spike(x, levels)
    after, parts = {}, {}
    for name, branch in (("q", branch_q), ("k", branch_k), ("v", branch_v)):
        z, after[name] = rep_and_norm(x0, branch, bits, training)
        parts[name] = tokens(integer_spike(z, levels), H)
    o = untokens(attention_core(parts["q"], parts["k"], parts["v"], scale), Y, X)
    y, after["proj"] = rep_and_norm(integer_spike(o, levels, 2.0), branch_o, bits, training)
    return y, after


def attention_distillation(students, teachers):
    """mean squared difference of each pair of maps, averaged over layers."""
    total = 0.0
    for s, t in zip(students, teachers):
        total = total + ((s - t) ** 2).sum() / s.numel()
    return total / len(students)
