"""Conditional DETR's cross-attention, one query, one head and one key at a time."""

import math

import torch


def linear(vector, weight, bias):
    return torch.stack([(weight[o] * vector).sum() + bias[o] for o in range(weight.shape[0])])


def naive_sine(point, M):
    """point (x, y) in [0, 1] -> (M,): M / 2 features of y, then M / 2 of x."""
    n = M // 2
    out = []
    for c in (point[1], point[0]):
        for j in range(n):
            angle = 2 * math.pi * c / 10000 ** (2 * (j // 2) / n)
            out.append(torch.sin(angle) if j % 2 == 0 else torch.cos(angle))
    return torch.stack(out)


def naive_scaled_sine(state, point, W0, b0, W1, b1):
    """p_q = lambda * p_s with lambda = W1 relu(W0 state + b0) + b1; state (M,), point (2,)."""
    scale = linear(torch.relu(linear(state, W0, b0)), W1, b1)
    return scale * naive_sine(point, len(state))


def naive_conditional_cross(f, mem, pos, sine, p, heads, qpos=None, keep=None):
    """f (B, T, M), mem and pos (B, S, M), sine (B, T, M) = p_q before W_qs, qpos (B, T, M) in the first layer only.

    p: role -> (weight, bias) with roles qcontent, qpos, kcontent, kpos, v, qpos_sine, o. keep (B, S).
        c_q = W_qc f;  c_k = W_kc mem;  p_k = W_kp pos;  v = W_v mem;  p_q' = W_qs sine
        first layer: c_q += W_qp qpos, c_k += p_k
        z = (<c_q, c_k> + <p_q', p_k>) / sqrt(2 D) per head;  out = W_o concat(softmax(z) v) + b_o
    """
    B, T, M = f.shape
    S, D = mem.shape[1], M // heads
    out = torch.zeros(B, T, M, dtype=f.dtype)
    rows = []
    for b in range(B):
        ck = [linear(mem[b, s], *p["kcontent"]) for s in range(S)]
        pk = [linear(pos[b, s], *p["kpos"]) for s in range(S)]
        v = [linear(mem[b, s], *p["v"]) for s in range(S)]
        if qpos is not None:
            ck = [c + k for c, k in zip(ck, pk)]
        for t in range(T):
            cq = linear(f[b, t], *p["qcontent"])
            pq = linear(sine[b, t], *p["qpos_sine"])
            if qpos is not None:
                cq = cq + linear(qpos[b, t], *p["qpos"])
            merged = []
            for h in range(heads):
                at = slice(h * D, (h + 1) * D)
                seen = [s for s in range(S) if keep is None or keep[b, s]]
                z = [((cq[at] * ck[s][at]).sum() + (pq[at] * pk[s][at]).sum()) / math.sqrt(2 * D) for s in seen]
                top = max((float(one.detach()) for one in z), default=0.0)
                e = [torch.exp(one - top) for one in z]
                acc = torch.zeros(D, dtype=f.dtype)
                for one, s in zip(e, seen):
                    acc = acc + one / sum(e) * v[s][at]
                merged.append(acc)
            rows.append(linear(torch.cat(merged), *p["o"]))
    out = torch.stack(rows).reshape(B, T, M)
    return out
