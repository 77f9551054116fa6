"""The Triton programs behind `triton_attention`: softmax attention over lists of blocks.

    O_i = sum_j P_ij V_j,    P_ij = 2^(S_ij - L_i),    S = log2(e) scale Q K^T,    L_i = log2 sum_j 2^S_ij

    dS = P * (dO V^T - delta),    delta_i = dO_i . O_i - log2(e) dL_i
    dQ = scale dS K,    dK = scale dS^T Q,    dV = P^T dO

After FlashAttention: the running maximum and sum of Dao, Fu, Ermon, Rudra, Re 2022, https://arxiv.org/abs/2205.14135,
and the loops' order of Dao 2023, https://arxiv.org/abs/2307.08691; the papers were not read for it, the formulas above
are derived and checked against float64.

A program has one block of queries (or of keys), walks over its line's full blocks, then over its partial ones, and
writes every entry of its block, so nothing needs to be filled beforehand. Nothing is added up across programs: results
are the same every time. In partial blocks, what is not finite is taken out before products, where 0 * NaN would spread
it to rows that may not see it, and put back into the rows that do. Query heads of a group read the same keys.
"""

import triton
import triton.language as tl


@triton.jit
def finite(x):
    """x with 0 in place of NaN and inf."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def load(base, first, stride, N: tl.constexpr, count, WIDTH: tl.constexpr, width):
    """(N, WIDTH) entries from row `first` on, 0 past `count` rows or `width` columns."""
    n, w = (first + tl.arange(0, N)).to(tl.int64)[:, None], tl.arange(0, WIDTH)[None, :]
    return tl.load(base + n * stride + w, mask=(n < count) & (w < width), other=0.0)


@triton.jit
def store(base, first, stride, values, N: tl.constexpr, count, WIDTH: tl.constexpr, width):
    """The same place, written."""
    n, w = (first + tl.arange(0, N)).to(tl.int64)[:, None], tl.arange(0, WIDTH)[None, :]
    tl.store(base + n * stride + w, values.to(base.dtype.element_ty), mask=(n < count) & (w < width))


@triton.jit
def tile(tiles, number, N: tl.constexpr, M: tl.constexpr):
    """Tile `number`, (N, M), true = may attend."""
    at = number.to(tl.int64) * (N * M)
    return tl.load(tiles + at + tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :]) != 0


@triton.jit
def bounds(bound, t, T):
    """L of rows t. One that sees nothing has -inf; its weights come out as 0 from the other end as well."""
    found = tl.load(bound + t, mask=t < T, other=float("inf"))
    return tl.where(found == float("-inf"), float("inf"), found)


@triton.jit
def line_of(start, middle, line, n, DENSE: tl.constexpr):
    """First, middle and end of a line's blocks; without lists every block is there, and full."""
    if DENSE:
        first, half, last = n * 0, n, n
    else:
        first, half, last = tl.load(start + line), tl.load(middle + line), tl.load(start + line + 1)
    return first, half, last


@triton.jit
def block_at(at, s, DENSE: tl.constexpr):
    """The number of the block that stands at place s of the lists."""
    if DENSE:
        return s
    else:
        return tl.load(at + s)


@triton.jit
def softmax_step(
    acc, top, total, q, k, v, s, at, tile_of, tiles, k_st, v_st, S, D, V, scale,
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    DENSE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: running maximum, sum and output, each corrected for what is new."""
    c = block_at(at, s, DENSE)
    keys = load(k, c * BK, k_st, BK, S, BD, D)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
    values = load(v, c * BK, v_st, BK, S, BV, V)
    allowed = (c * BK + tl.arange(0, BK) < S)[None, :]
    if MASKED:
        allowed = allowed & tile(tiles, tl.load(tile_of + s), BQ, BK)
        # The rows that see a value which is not finite, and no others, must show it.
        spoilt = tl.max((tl.abs(values) < float("inf")).to(tl.int32) ^ 1, 1)[None, :] > 0
        acc = tl.where((tl.max((spoilt & allowed).to(tl.int32), 1) > 0)[:, None], float("nan"), acc)
        values = finite(values)
    scores = tl.where(allowed, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    floor = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: -inf - (-inf) would be NaN
    weights = tl.exp2(scores - floor[:, None])
    shrink = tl.exp2(top - floor)
    acc = acc * shrink[:, None]
    acc += tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return acc, higher, total * shrink + tl.sum(weights, 1)


@triton.jit
def forward(
    q, k, v, out, bound, start, middle, at, tile_of, tiles,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, o_sb, o_sh, o_st,
    H, group, T, S, D, V, nq, nk, line_b, line_h, scale,
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    DENSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for each (b, h, block of queries): outputs, and L."""
    program = tl.program_id(0).to(tl.int64)
    r, head = (program % nq).to(tl.int32), program // nq
    b, h = head // H, head % H
    q, out = q + b * q_sb + h * q_sh, out + b * o_sb + h * o_sh
    k, v = k + b * k_sb + (h // group) * k_sh, v + b * v_sb + (h // group) * v_sh
    queries = load(q, r * BQ, q_st, BQ, T, BD, D)
    acc = tl.zeros((BQ, BV), tl.float32)
    top, total = tl.full((BQ,), float("-inf"), tl.float32), tl.zeros((BQ,), tl.float32)
    first, half, last = line_of(start, middle, (b * line_b + h * line_h) * nq + r, nk, DENSE)
    for s in range(first, half):
        acc, top, total = softmax_step(
            acc, top, total, queries, k, v, s, at, tile_of, tiles, k_st, v_st, S, D, V, scale,
            BQ, BK, BD, BV, DENSE, False, PRECISION,
        )  # fmt: skip
    if not DENSE:
        for s in range(half, last):
            acc, top, total = softmax_step(
                acc, top, total, queries, k, v, s, at, tile_of, tiles, k_st, v_st, S, D, V, scale,
                BQ, BK, BD, BV, DENSE, True, PRECISION,
            )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    store(out, r * BQ, o_st, acc, BQ, T, BV, V)
    t = r * BQ + tl.arange(0, BQ)
    tl.store(bound + head * T + t, top + tl.log2(total), mask=t < T)


@triton.jit
def query_step(
    dq, q, dout, top, delta, k, v, s, at, tile_of, tiles, k_st, v_st, S, D, V, scale,
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    DENSE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to the gradient of the queries (without the scale)."""
    c = block_at(at, s, DENSE)
    keys, values = load(k, c * BK, k_st, BK, S, BD, D), load(v, c * BK, v_st, BK, S, BV, V)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
    shifted = tl.dot(dout, tl.trans(values), input_precision=PRECISION) - delta[:, None]
    allowed = (c * BK + tl.arange(0, BK) < S)[None, :]
    if MASKED:
        allowed = allowed & tile(tiles, tl.load(tile_of + s), BQ, BK)
        keys = finite(keys)
    change = tl.where(allowed, tl.exp2(scores - top[:, None]) * shifted, 0.0)
    return dq + tl.dot(change.to(keys.dtype), keys, input_precision=PRECISION)


@triton.jit
def backward_queries(
    q, k, v, out, bound, dout, dbound, dq, delta, start, middle, at, tile_of, tiles,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, o_sb, o_sh, o_st, g_sb, g_sh, g_st, d_sb, d_sh, d_st,
    H, group, T, S, D, V, nq, nk, line_b, line_h, scale, scale_log2,
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    DENSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for each (b, h, block of queries): delta, and the gradient of the queries."""
    program = tl.program_id(0).to(tl.int64)
    r, head = (program % nq).to(tl.int32), program // nq
    b, h = head // H, head % H
    k, v = k + b * k_sb + (h // group) * k_sh, v + b * v_sb + (h // group) * v_sh
    queries = load(q + b * q_sb + h * q_sh, r * BQ, q_st, BQ, T, BD, D)
    output = load(out + b * o_sb + h * o_sh, r * BQ, o_st, BQ, T, BV, V)
    gradient = load(dout + b * g_sb + h * g_sh, r * BQ, g_st, BQ, T, BV, V)
    t = r * BQ + tl.arange(0, BQ)
    own = tl.sum(output.to(tl.float32) * gradient.to(tl.float32), 1)
    own -= tl.load(dbound + head * T + t, mask=t < T, other=0.0) * 1.4426950408889634
    tl.store(delta + head * T + t, own, mask=t < T)
    top = bounds(bound + head * T, t, T)
    acc = tl.zeros((BQ, BD), tl.float32)
    first, half, last = line_of(start, middle, (b * line_b + h * line_h) * nq + r, nk, DENSE)
    for s in range(first, half):
        acc = query_step(
            acc, queries, gradient, top, own, k, v, s, at, tile_of, tiles, k_st, v_st, S, D, V, scale_log2,
            BQ, BK, BD, BV, DENSE, False, PRECISION,
        )  # fmt: skip
    if not DENSE:
        for s in range(half, last):
            acc = query_step(
                acc, queries, gradient, top, own, k, v, s, at, tile_of, tiles, k_st, v_st, S, D, V, scale_log2,
                BQ, BK, BD, BV, DENSE, True, PRECISION,
            )  # fmt: skip
    store(dq + b * d_sb + h * d_sh, r * BQ, d_st, acc * scale, BQ, T, BD, D)


@triton.jit
def key_step(
    dk, dv, keys, values, inside, q, dout, bound, delta, s, at, tile_of, tiles, q_st, g_st, T, D, V, scale,
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    DENSE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one block of queries adds to the gradients of keys (without the scale) and values."""
    r = block_at(at, s, DENSE)
    queries, gradient = load(q, r * BQ, q_st, BQ, T, BD, D), load(dout, r * BQ, g_st, BQ, T, BV, V)
    t = r * BQ + tl.arange(0, BQ)
    top = bounds(bound, t, T)
    own = tl.load(delta + t, mask=t < T, other=0.0)
    scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
    shifted = tl.dot(values, tl.trans(gradient), input_precision=PRECISION) - own[None, :]
    allowed = inside[:, None]
    if MASKED:
        allowed = allowed & tl.trans(tile(tiles, tl.load(tile_of + s), BQ, BK))
        queries, gradient = finite(queries), finite(gradient)
    weights = tl.where(allowed, tl.exp2(scores - top[None, :]), 0.0)
    change = tl.where(allowed, weights * shifted, 0.0)
    dv += tl.dot(weights.to(gradient.dtype), gradient, input_precision=PRECISION)
    dk += tl.dot(change.to(queries.dtype), queries, input_precision=PRECISION)
    return dk, dv


@triton.jit
def backward_keys(
    q, k, v, bound, dout, delta, dk, dv, start, middle, at, tile_of, tiles,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, g_sb, g_sh, g_st, dk_sb, dk_sh, dk_st, dv_sb, dv_sh, dv_st,
    H, group, T, S, D, V, nq, nk, line_b, line_h, scale, scale_log2,
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    DENSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for each (b, key head, block of keys): gradients of keys and values, over the group's queries."""
    program = tl.program_id(0).to(tl.int64)
    c, head = (program % nk).to(tl.int32), program // nk
    b, g = head // (H // group), head % (H // group)
    keys = load(k + b * k_sb + g * k_sh, c * BK, k_st, BK, S, BD, D)
    values = load(v + b * v_sb + g * v_sh, c * BK, v_st, BK, S, BV, V)
    j = c * BK + tl.arange(0, BK)
    key_sum, value_sum = tl.zeros((BK, BD), tl.float32), tl.zeros((BK, BV), tl.float32)
    for n in range(0, group):
        h = g * group + n
        mine, theirs = q + b * q_sb + h * q_sh, dout + b * g_sb + h * g_sh
        top, own = bound + (b * H + h) * T, delta + (b * H + h) * T
        first, half, last = line_of(start, middle, (b * line_b + h * line_h) * nk + c, nq, DENSE)
        for s in range(first, half):
            key_sum, value_sum = key_step(
                key_sum, value_sum, keys, values, j < S, mine, theirs, top, own, s, at, tile_of, tiles,
                q_st, g_st, T, D, V, scale_log2, BQ, BK, BD, BV, DENSE, False, PRECISION,
            )  # fmt: skip
        if not DENSE:
            for s in range(half, last):
                key_sum, value_sum = key_step(
                    key_sum, value_sum, keys, values, j < S, mine, theirs, top, own, s, at, tile_of, tiles,
                    q_st, g_st, T, D, V, scale_log2, BQ, BK, BD, BV, DENSE, True, PRECISION,
                )  # fmt: skip
    store(dk + b * dk_sb + g * dk_sh, c * BK, dk_st, key_sum * scale, BK, S, BD, D)
    store(dv + b * dv_sb + g * dv_sh, c * BK, dv_st, value_sum, BK, S, BV, V)
