"""Task-adapted attention in windows, its adapter and its norm, in loops.

Its author saw only an account of the equations, neither code nor tests of the library.
"""

import math

import torch
import torch.nn.functional as F


# --- (a) task bias
def task_bias(task, base, w_film, b_film, window):
    """Eq. 2-4 in closed form, width w = window. task (B,Et), base = R0 (L,w), w_film (2w,Et), b_film (2w,), L =
    window^2 -> (B,L,L).

    T[i,j] = (1 + gamma[j mod w]) R0[i, j mod w] + beta[j mod w] if i // w == j // w, else 0. The library's shape is
    this[:, None]."""
    L, w = base.shape
    assert w == window
    assert window * window == L
    out = torch.zeros(task.shape[0], L, L, dtype=base.dtype)
    for b in range(task.shape[0]):
        gb = F.linear(task[b], w_film, b_film)
        gamma, beta = gb[:w], gb[w:]
        for i in range(L):
            for j in range(L):
                if i // w == j // w:
                    out[b, i, j] = (1 + gamma[j % w]) * base[i, j % w] + beta[j % w]
    return out


def task_bias_chunks(task, base, w_film, b_film, blocks):
    """Eq. 2-3 as the code does it, for any L, w, number of blocks: chunks of ceil(L / blocks) rows on a block
    diagonal, cut to L columns."""
    L, w = base.shape
    rows = -(-L // blocks)
    out = []
    for b in range(task.shape[0]):
        gb = F.linear(task[b], w_film, b_film)
        gamma, beta = gb[:w], gb[w:]
        full = torch.zeros(L, -(-L // rows) * w, dtype=base.dtype)
        for i in range(L):
            for j in range(w):
                full[i, (i // rows) * w + j] = (1 + gamma[j]) * base[i, j] + beta[j]
        out.append(full[:, :L])
    return torch.stack(out)


def relative_bias(table, window):
    """Swin's table ((2w-1)^2, H) -> (H,L,L): entry (i,j) is row (dy + w-1)(2w-1) + dx + w-1, query minus key."""
    w, H = window, table.shape[1]
    out = torch.empty(H, w * w, w * w, dtype=table.dtype)
    for h in range(H):
        for i in range(w * w):
            for j in range(w * w):
                dy, dx = i // w - j // w, i % w - j % w
                out[h, i, j] = table[(dy + w - 1) * (2 * w - 1) + dx + w - 1, h]
    return out


def window_attention(x, w_qkv, b_qkv, w_out, b_out, table, num_heads, window, *, bias=None, mask=None):
    """Eq. 1, 5. x (B nW, L, M), windows sample-major (all windows of sample 0 first); w_qkv (3M,M): q, k, v; table
    ((2w-1)^2,H);
    bias (B,L,L) = T(e) or None, the same for all heads and windows of a sample; mask (nW,L,L) of 0 / -100 or None."""
    R, L, M = x.shape
    D = M // num_heads
    qkv = F.linear(x, w_qkv, b_qkv)
    q, k, v = qkv[..., :M], qkv[..., M : 2 * M], qkv[..., 2 * M :]
    rel = relative_bias(table, window)
    per_sample = R if bias is None else R // bias.shape[0]
    out = []
    for r in range(R):
        rows = []
        for i in range(L):
            heads = []
            for h in range(num_heads):
                c = slice(h * D, (h + 1) * D)
                s = []
                for j in range(L):
                    u = (q[r, i, c] / math.sqrt(D) * k[r, j, c]).sum() + rel[h, i, j]
                    if bias is not None:
                        u = u + bias[r // per_sample, i, j]
                    if mask is not None:
                        u = u + mask[r % mask.shape[0], i, j]
                    s.append(u)
                a = torch.softmax(torch.stack(s), 0)
                heads.append(sum(a[j] * v[r, j, c] for j in range(L)))
            rows.append(torch.cat(heads))
        out.append(torch.stack(rows))
    return F.linear(torch.stack(out), w_out, b_out)


# --- (b) adapter
def task_adapter(task, x, w_e, b_e, w_film, b_film, w_down, b_down, w_up, b_up):
    """Eq. 6, one adapter on h_in = x + h_prev. task (B,Et), x (B,N,M), w_e (Et,Et), w_film (2M,Et), w_down (M//3,M),
    w_up (M,M//3).
    No nonlinearity, no residual inside. reduction = 3 is read off w_down."""
    B, N, M = x.shape
    c = F.linear(task, w_e, b_e)
    gb = F.linear(c, w_film, b_film)
    out = torch.empty_like(x)
    for b in range(B):
        gamma, beta = gb[b, :M], gb[b, M:]
        for n in range(N):
            h = (1 + gamma) * x[b, n] + beta
            out[b, n] = F.linear(F.linear(h, w_down, b_down), w_up, b_up)
    return out


def with_adapters(task, x, blocks, adapters):
    """Eq. 6 over a stage: h starts at 0; after each block h <- adapter(task, x + h) -> (x, h). The encoder's output
    is h."""
    h = torch.zeros_like(x)
    for block, params in zip(blocks, adapters):
        x = block(x)
        h = task_adapter(task, x + h, *params)
    return x, h


# --- (c) task-scaled norm
def task_scaled_norm(x, task, weight, bias, w_film, b_film, *, task_id=None, eps=1e-5):
    """Eq. 7. x (B,N,M), task (B,Et), weight, bias (M,), w_film (2M,Et). LN over channels times (1 + gamma) weight +
    beta, plus bias.

    task_id (B,) long: the code gives all samples of one id the embedding of the FIRST sample with it; None: each
    sample its own (the same
    whenever rows with one id are equal).
    OPEN: which of the two a library form without ids should follow: its signature has no task_id, so the second."""
    B, N, M = x.shape
    out = torch.empty_like(x)
    for b in range(B):
        first = b if task_id is None else [int(t) for t in task_id].index(int(task_id[b]))
        gb = F.linear(task[first], w_film, b_film)
        scale = (1 + gb[:M]) * weight + gb[M:]
        for n in range(N):
            u = x[b, n]
            mean = u.sum() / M
            var = ((u - mean) ** 2).sum() / M
            out[b, n] = (u - mean) / torch.sqrt(var + eps) * scale + bias
    return out
