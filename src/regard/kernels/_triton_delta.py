"""The Triton programs behind `triton_delta`: what each token finds of its value missing, chunk by chunk.

    e_i = v_i - k_i S'_i      S'_i = exp(g_i) S_{i-1}      S_i = S'_i + k_i^T b_i e_i

Within a chunk that is a triangular system, (I + L) e = v - (k exp(P g)) S, with S the state before the chunk and L_ij =
W_ij b_j below the diagonal, W as in `_triton_scan` with keys for queries. The gradient of v solves the transposed
system from the end: e_i = dv_i - b_i k_i D_i with D_{i-1} = exp(g_i) (D_i + k_i^T e_i).
"""

import triton
import triton.language as tl

from regard.kernels._triton_scan import decays, factor, load, total


@triton.jit
def run_inverse(weights, rates, inverse, T, REVERSE: tl.constexpr, C: tl.constexpr):
    """(I + L)^-1 of one chunk, or of its transpose's, row by row: powers of L would cancel where keys are alike."""
    N = tl.cdiv(T, C)
    head, n = tl.program_id(0).to(tl.int64) // N, tl.program_id(0) % N
    i, base = tl.arange(0, C), (head * N + n) * C * C
    rate = tl.load(rates + head * T + n * C + i, mask=i < T - n * C, other=0.0)
    made = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(rate.dtype)
    for m in range(1, C):
        r = C - 1 - m if REVERSE else m
        if REVERSE:
            row = tl.load(weights + base + i * C + r) * tl.sum(tl.where(i == r, rate, 0.0), 0)
            row = tl.where(i > r, row, 0.0)
        else:
            row = tl.where(i < r, tl.load(weights + base + r * C + i) * rate, 0.0)
        made -= tl.where(i[:, None] == r, tl.sum(row[:, None] * made, 0)[None, :], 0.0)
    tl.store(inverse + base + i[:, None] * C + i[None, :], made)


@triton.jit
def run_solve(
    k, v, rates, decay, first, inverse, out, T,
    REVERSE: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, EXACT: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """e of one head and one tile of values, all key features at once; reversed the gradient of v, from that of e."""
    head, N = tl.program_id(0).to(tl.int64), tl.cdiv(T, C)
    i, f, c = tl.arange(0, C), tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    inside = (f[:, None] < K) & (c[None, :] < V)
    if REVERSE:
        state = tl.zeros((BK, BV), out.dtype.element_ty)
    else:
        state = tl.load(first + head * K * V + f[:, None] * V + c[None, :], mask=inside, other=0.0)
    for m in range(N):
        n = N - 1 - m if REVERSE else m
        at, rows = head * T + n * C, T - n * C
        key, y = load(k + at * K, i, rows, f, K), load(v + at * V, i, rows, c, V)
        rate = tl.load(rates + at + i, mask=i < rows, other=0.0)[:, None]
        asks, adds = key, key
        if DECAY:
            width: tl.constexpr = K if DECAY == 2 else 1
            g = decays(decay + at * width, i, rows, f, width, DECAY)
            upto = factor(total(i[None, :] <= i[:, None], g, EXACT))
            after = factor(total(i[None, :] > i[:, None], g, EXACT))
            asks = key * (after if REVERSE else upto)
            adds = key * (upto if REVERSE else after)
        read = tl.dot(asks, state, input_precision=EXACT)
        made = y - (rate * read if REVERSE else read)
        chunk = tl.load(inverse + (head * N + n) * C * C + i[:, None] * C + i[None, :])
        made = tl.dot(chunk, made, input_precision=EXACT)
        tl.store(out + at * V + i[:, None] * V + c[None, :], made, mask=(i[:, None] < rows) & (c[None, :] < V))
        if DECAY:
            state *= tl.exp(tl.sum(g, 0)) if DECAY == 1 else tl.exp(tl.sum(g, 0))[:, None]
        state += tl.dot(tl.trans(adds), made if REVERSE else rate * made, input_precision=EXACT)
