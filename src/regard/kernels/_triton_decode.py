"""The Triton programs behind `triton_decode`: softmax over pieces of the keys, then the pieces of each query merged.

    piece:  m = max_j s_j    z = sum_j exp(s_j - m)    o = sum_j exp(s_j - m) v_j        s_j = scale q . k_j
    merge:  m' = max m       z' = sum exp(m - m') z    o' = sum exp(m - m') o            out = o' / z'

Ye et al. 2024, https://arxiv.org/abs/2402.15220 (abstract and code, as the card says): chunk first, sequence first. The
case without sharing is split-KV decoding, known as Flash-Decoding (not read): long caches are cut so that there is work
for all processors.
"""

import triton
import triton.language as tl


@triton.jit
def load(at, stride, i, rows, f, width):
    """The tile of rows i and features f, with zeros past the last."""
    return tl.load(at + i[:, None] * stride + f[None, :], mask=(i[:, None] < rows) & (f[None, :] < width), other=0.0)


@triton.jit
def run_pieces(
    q, k, v, start, tokens, position, slot, rows, row_of, lengths, m_out, z_out, o_out,
    from_piece, k_head, k_token, v_head, v_token,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One piece and one key head, for all rows that share the piece and all of their heads that read this one."""
    piece, group = from_piece + tl.program_id(0), tl.program_id(1).to(tl.int64)
    dtype = o_out.dtype.element_ty
    i, d, c = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    valid = i < tl.load(rows + piece) * R
    slots, head = tl.load(slot + piece).to(tl.int64) + i // R, group * R + i % R
    row = tl.load(row_of + slots, mask=valid, other=0).to(tl.int64)
    here = valid[:, None] & (d[None, :] < D)
    a = tl.load(q + (row * H + head)[:, None] * D + d[None, :], mask=here, other=0.0).to(dtype)
    longest = tl.max(tl.load(lengths + row, mask=valid, other=0), 0)
    count = tl.minimum(tl.load(tokens + piece), longest - tl.load(position + piece))
    first = tl.load(start + piece).to(tl.int64)
    k_at, v_at = k + group * k_head + first * k_token, v + group * v_head + first * v_token
    m, z, o = tl.full((BM,), float("-inf"), dtype), tl.zeros((BM,), dtype), tl.zeros((BM, BV), dtype)
    for at in range(0, count, BN):
        j = at + tl.arange(0, BN)
        s = tl.dot(a, tl.trans(load(k_at, k_token, j, count, d, D).to(dtype)), input_precision=PRECISION) * SCALE
        s = tl.where(j[None, :] < count, s, float("-inf"))
        most = tl.maximum(m, tl.max(s, 1))
        finite = tl.where(most == float("-inf"), 0.0, most)
        kept, e = tl.exp(m - finite), tl.exp(s - finite[:, None])
        z = z * kept + tl.sum(e, 1)
        o = o * kept[:, None] + tl.dot(e, load(v_at, v_token, j, count, c, V).to(dtype), input_precision=PRECISION)
        m = most
    to = slots * H + head
    tl.store(m_out + to, m, mask=valid)
    tl.store(z_out + to, z, mask=valid)
    tl.store(o_out + to[:, None] * V + c[None, :], o, mask=valid[:, None] & (c[None, :] < V))


@triton.jit
def run_merge(m_in, z_in, o_in, order, bounds, out, H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """All pieces of one row and one head; 0 where there are none."""
    row, head = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    dtype = o_in.dtype.element_ty
    c = tl.arange(0, BV)
    m, z, o = tl.full((1,), float("-inf"), dtype), tl.zeros((1,), dtype), tl.zeros((BV,), dtype)
    for at in range(tl.load(bounds + row), tl.load(bounds + row + 1)):
        place = tl.load(order + at).to(tl.int64) * H + head
        m_new = tl.load(m_in + place)
        most = tl.maximum(m, m_new)
        finite = tl.where(most == float("-inf"), 0.0, most)
        x, y = tl.exp(m - finite), tl.exp(m_new - finite)
        z = x * z + y * tl.load(z_in + place)
        o = x * o + y * tl.load(o_in + place * V + c, mask=c < V, other=0.0)
        m = most
    tl.store(out + tl.program_id(0).to(tl.int64) * V + c, o / tl.where(z == 0, 1.0, z), mask=c < V)
