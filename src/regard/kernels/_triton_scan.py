"""The Triton programs behind `triton_scan`: the causal linear scan with decay, chunk by chunk, and its gradients.

    S_n+1 = exp(sum g) S_n + (k * exp(U g))^T v       what stands before chunk n, from what the chunk before it adds
    o     = (q * exp(P g)) S_n + W v                  W_ij = sum_d q_id k_jd exp(g_j+1,d + .. + g_id) for j <= i, else 0
    D_n-1 = exp(sum g) D_n + (q * exp(P g))^T do      gradient of what stands behind chunk n: the same, from the end
    dv    = (k * exp(U g)) D_n + W^T do

P and U are 0/1 matrices: P g sums the decays from the chunk's start up to a token, with its own; U g those after it.
Both are <= 0, and no decay is ever divided by. Per key feature, W is made by halves as in `linear_scan`: between an
earlier and a later stretch of s tokens the decay has two factors that meet in the middle, for s = 1, 2, 4, .. Gradients
of decays are sums of the same terms (P^T, U^T), never differences of running totals.

Every program writes all of its own tile and nothing else. DECAY is 0 (none), 1 (by time) or 2 (by time and feature).
The method: Yang et al. 2023, https://arxiv.org/abs/2312.06635, abstract (chunkwise, two-dimensional decays).
"""

import triton
import triton.language as tl


@triton.jit
def load(at, i, rows, f, width):
    """The tile of tokens i and features f, with zeros where the chunk has no more rows, or a row no more features."""
    inside = (i[:, None] < rows) & (f[None, :] < width)
    return tl.load(at + i[:, None] * width + f[None, :], mask=inside, other=0.0)


@triton.jit
def decays(at, i, rows, f, width, DECAY: tl.constexpr):
    """The decays of a chunk: (C,) by time, (C, features) by feature; a finite stand-in for -inf, as 0 * inf is NaN."""
    if DECAY == 1:
        return tl.load(at + i, mask=i < rows, other=0.0)
    else:
        g = load(at, i, rows, f, width)
        return tl.where(g < -1e4, -1e4, g)


@triton.jit
def total(chosen, x, EXACT: tl.constexpr):
    """Row by row the sum of those tokens' x that are chosen (C, C); x is (C,) or (C, features)."""
    if len(x.shape) == 1:
        return tl.sum(tl.where(chosen, x[None, :], 0.0), 1)
    else:
        return tl.dot(chosen.to(x.dtype), x, input_precision=EXACT)


@triton.jit
def factor(exponent):
    """exp as something that a (C, features) tile can be multiplied with."""
    if len(exponent.shape) == 1:
        return tl.exp(exponent)[:, None]
    else:
        return tl.exp(exponent)


@triton.jit
def between(i, g):
    """Entry i, j is exp(g_j+1 + .. + g_i), for j <= i."""
    return tl.exp(tl.cumsum(tl.where(i[:, None] > i[None, :], g[:, None], 0.0), 0))


@triton.jit
def stretches(i, s):
    """P and U within stretches of s tokens; and the pairs of a token in an odd stretch with one in the even before."""
    at, to = i[:, None], i[None, :]
    same = at // s == to // s
    return same & (to <= at), same & (to > at), (at // s == to // s + 1) & ((at // s) % 2 == 1)


@triton.jit
def owed(upto, after, a, b, EXACT: tl.constexpr):
    """P^T a + U^T b: the gradient of g, where P g is owed a and U g is owed b."""
    return total(tl.trans(upto), a, EXACT) + total(tl.trans(after), b, EXACT)


@triton.jit
def run_states(
    x, y, decay, first, states, last, T,
    REVERSE: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The state before every chunk and the last one, x = k and y = v; reversed the gradients of those behind, x = q."""
    head, N = tl.program_id(0).to(tl.int64), tl.cdiv(T, C)
    i, f, c = tl.arange(0, C), tl.program_id(1) * BK + tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    place, inside = f[:, None] * V + c[None, :], (f[:, None] < K) & (c[None, :] < V)
    state = tl.load(first + head * K * V + place, mask=inside, other=0.0)
    for m in range(N):
        n = N - 1 - m if REVERSE else m
        tl.store(states + (head * N + n) * K * V + place, state, mask=inside)
        at, rows = head * T + n * C, T - n * C
        a = load(x + at * K, i, rows, f, K).to(state.dtype)
        b = load(y + at * V, i, rows, c, V).to(state.dtype)
        if DECAY:
            width: tl.constexpr = K if DECAY == 2 else 1
            g = decays(decay + at * width, i, rows, f, width, DECAY)
            a *= factor(total(i[None, :] <= i[:, None] if REVERSE else i[None, :] > i[:, None], g, EXACT))
            state *= tl.exp(tl.sum(g, 0)) if DECAY == 1 else tl.exp(tl.sum(g, 0))[:, None]
        state += tl.dot(tl.trans(a), b, input_precision=PRECISION)
    tl.store(last + head * K * V + place, state, mask=inside)


@triton.jit
def run_weights(
    q, k, decay, weights, T,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """W of one chunk."""
    N = tl.cdiv(T, C)
    head, n = tl.program_id(0).to(tl.int64) // N, tl.program_id(0) % N
    i, at, rows = tl.arange(0, C), head * T + n * C, T - n * C
    dtype = weights.dtype.element_ty
    w = tl.zeros((C, C), dtype)
    for start in range(0, K, BK):
        f = start + tl.arange(0, BK)
        a, b = load(q + at * K, i, rows, f, K).to(dtype), load(k + at * K, i, rows, f, K).to(dtype)
        if DECAY == 2:
            g = decays(decay + at * K, i, rows, f, K, DECAY)
            w += tl.where(i[:, None] == i[None, :], tl.sum(a * b, 1)[:, None], 0.0)
            for level in range(LEVELS):
                upto, after, pairs = stretches(i, 1 << level)
                late, early = a * tl.exp(total(upto, g, EXACT)), b * tl.exp(total(after, g, EXACT))
                w += tl.where(pairs, tl.dot(late, tl.trans(early), input_precision=PRECISION), 0.0)
        else:
            w += tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if DECAY == 1:
        w *= between(i, decays(decay + at, i, rows, i, 1, DECAY))
    w = tl.where(i[:, None] >= i[None, :], w, 0.0)
    tl.store(weights + (head * N + n) * C * C + i[:, None] * C + i[None, :], w)


@triton.jit
def run_outputs(
    x, y, decay, states, weights, out, T,
    REVERSE: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk, x = q and y = v; reversed dv, x = k and y = do."""
    N = tl.cdiv(T, C)
    head, n = tl.program_id(0).to(tl.int64) // N, tl.program_id(0) % N
    i, c = tl.arange(0, C), tl.program_id(1) * BV + tl.arange(0, BV)
    at, rows = head * T + n * C, T - n * C
    w = tl.load(weights + (head * N + n) * C * C + i[:, None] * C + i[None, :])
    made = tl.dot(tl.trans(w) if REVERSE else w, load(y + at * V, i, rows, c, V).to(w.dtype), input_precision=PRECISION)
    for start in range(0, K, BK):
        f = start + tl.arange(0, BK)
        a = load(x + at * K, i, rows, f, K).to(w.dtype)
        if DECAY:
            width: tl.constexpr = K if DECAY == 2 else 1
            g = decays(decay + at * width, i, rows, f, width, DECAY)
            a *= factor(total(i[None, :] > i[:, None] if REVERSE else i[None, :] <= i[:, None], g, EXACT))
        made += tl.dot(a, load(states + (head * N + n) * K * V, f, K, c, V), input_precision=PRECISION)
    place, inside = i[:, None] * V + c[None, :], (i[:, None] < rows) & (c[None, :] < V)
    tl.store(out + at * V + place, made, mask=inside)


@triton.jit
def run_gradients(
    q, k, v, decay, dout, states, behind, dq, dk, ddecay, T,
    K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dq, dk and the decays' gradients of one chunk and one tile of key features (by time: that tile's part)."""
    N = tl.cdiv(T, C)
    head, n = tl.program_id(0).to(tl.int64) // N, tl.program_id(0) % N
    i, f = tl.arange(0, C), tl.program_id(1) * BK + tl.arange(0, BK)
    at, rows = head * T + n * C, T - n * C
    dtype = states.dtype.element_ty
    dw, da, db = tl.zeros((C, C), dtype), tl.zeros((C, BK), dtype), tl.zeros((C, BK), dtype)
    kept = tl.zeros((BK,), dtype)  # what the decays from the chunk's start to its end are owed
    for start in range(0, V, BV):
        c = start + tl.arange(0, BV)
        y, dy = load(v + at * V, i, rows, c, V).to(dtype), load(dout + at * V, i, rows, c, V).to(dtype)
        past = load(states + (head * N + n) * K * V, f, K, c, V)
        later = load(behind + (head * N + n) * K * V, f, K, c, V)
        dw += tl.dot(dy, tl.trans(y), input_precision=PRECISION)
        da += tl.dot(dy, tl.trans(past), input_precision=PRECISION)
        db += tl.dot(y, tl.trans(later), input_precision=PRECISION)
        kept += tl.sum(past * later, 1)
    dw = tl.where(i[:, None] >= i[None, :], dw, 0.0)
    a, b = load(q + at * K, i, rows, f, K).to(dtype), load(k + at * K, i, rows, f, K).to(dtype)
    upto, after = i[None, :] <= i[:, None], i[None, :] > i[:, None]
    if DECAY:
        width: tl.constexpr = K if DECAY == 2 else 1
        g = decays(decay + at * width, i, rows, f, width, DECAY)
        da *= factor(total(upto, g, EXACT))
        db *= factor(total(after, g, EXACT))
        kept *= tl.exp(tl.sum(g, 0))
    if DECAY == 1:
        dg = tl.sum(kept, 0) + owed(upto, after, tl.sum(a * da, 1), tl.sum(b * db, 1), EXACT)
        dw *= between(i, g)
        within = tl.where(i[:, None] > i[None, :], dw * tl.dot(a, tl.trans(b), input_precision=PRECISION), 0.0)
        dg += tl.sum(tl.where(tl.trans(after), tl.cumsum(within, 0, reverse=True), 0.0), 1)
        heads = tl.num_programs(0) // N
        tl.store(ddecay + (tl.program_id(1) * heads + head) * T + n * C + i, dg, mask=i < rows)
    if DECAY == 2:
        dg = kept[None, :] + owed(upto, after, a * da, b * db, EXACT)
        own = tl.sum(tl.where(i[:, None] == i[None, :], dw, 0.0), 1)[:, None]
        da += own * b
        db += own * a
        for level in range(LEVELS):
            upto, after, pairs = stretches(i, 1 << level)
            late, early = tl.exp(total(upto, g, EXACT)), tl.exp(total(after, g, EXACT))
            dpairs = tl.where(pairs, dw, 0.0)
            more_a = late * tl.dot(dpairs, b * early, input_precision=PRECISION)
            more_b = early * tl.dot(tl.trans(dpairs), a * late, input_precision=PRECISION)
            dg += owed(upto, after, a * more_a, b * more_b, EXACT)
            da += more_a
            db += more_b
        tl.store(ddecay + at * K + i[:, None] * K + f[None, :], dg, mask=(i[:, None] < rows) & (f[None, :] < K))
    else:
        da += tl.dot(dw, b, input_precision=PRECISION)
        db += tl.dot(tl.trans(dw), a, input_precision=PRECISION)
    place, inside = i[:, None] * K + f[None, :], (i[:, None] < rows) & (f[None, :] < K)
    tl.store(dq + at * K + place, da, mask=inside)
    tl.store(dk + at * K + place, db, mask=inside)
