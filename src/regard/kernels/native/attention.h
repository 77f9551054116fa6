// What the kernels share: the problem as Python hands it over, and the walk of a query block over its key blocks.
//
// Query blocks run in parallel; each walks over the key blocks that its row of the layout stores and keeps a running
// maximum and sum: the idea of Milakov & Gimelshein 2018 (https://arxiv.org/abs/1805.02867) and of FlashAttention (Dao et
// al. 2022, https://arxiv.org/abs/2205.14135), derived anew here, their texts not read. Within a block a strip of queries
// passes through score, bias, mask, exponential and values while it is in the nearer caches. Who multiplies matrices is
// the template's argument.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "simd.h"

namespace {
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t FEW = 1 << 15;  // keys over which sums in floats are exact enough
constexpr int64_t MOST = 256;  // queries or keys in a block, at most
}  // namespace

struct View {  // (B, heads, tokens, width), contiguous along width
    void* data;
    int64_t b, h, t;
    template <class Number = float>
    Number* at(int64_t B, int64_t H, int64_t T) const {
        return (Number*)data + B * b + H * h + T * t;
    }
};

extern "C" struct Attention {
    int64_t B, H, G, T, S, D, V, threads;
    View q, k, v, out;
    float* lse;      // (B, H, T)
    void* kt;        // scratch: keys in the order in which the products read them
    int32_t* odd;    // set to 1 where a query, a key or an output is NaN or infinite
    float scale, cap;  // scores become cap tanh(score / cap), if cap is not 0
    // Block layout; Bm and Hm are 1 or B and H. tile is -1 for full blocks, else an index into tiles (n, bq, bk).
    int64_t bq, bk, Bm, Hm;
    const int64_t *row_ptr, *cols;
    const int32_t* tile;
    const uint8_t* tiles;
    // What is added to the scores of head h at query t and key s: table[h * table_h + s - t + T - 1], if not null,
    const float* table;
    int64_t table_h;
    // and bias[b * bias_b + h * bias_h + t * bias_t + s * bias_s], if not null; bias_s is 0 or 1.
    const float* bias;
    int64_t bias_b, bias_h, bias_t, bias_s;
    // Backward only.
    View grad, dq, dk, dv;     // dq is (parts, B, H, T, D): each part sums its own key blocks, dq.data advances by part
    void* vt;                  // scratch: values likewise (bf16: forward, too)
    float* delta;              // scratch: (B, H, T)
    const float* dlse;         // (B, H, T) or null: what flows back to lse
    float* dtable;             // (parts, B, H, T + S - 1) or null
    const int64_t *col_ptr, *rows, *entry;  // the layout by columns: query blocks of each key block, and where stored
    int64_t parts;
    int64_t kind;  // of the numbers in q, k, v, out, grad, dk, dv: FP32, BF16 or HALF; all else is fp32
    int64_t amx;  // 1 where products of bf16 may run on tile registers
};
enum { FP32, BF16, HALF };

namespace {
inline int64_t cut(int64_t n, int64_t by) { return (n + by - 1) / by; }

// n is a multiple of W.
inline bool finite(const float* x, int64_t n) {
    vf probe = {};
    for (int64_t j = 0; j < n; j += W) probe += load(x + j) * 0.0f;
    return sum(probe) == 0;
}

struct Range { int64_t lo, hi; };

// The keys of a tile that any of these rows may see.
Range seen(const uint8_t* tile, int64_t bk, int64_t rows, int64_t keys) {
    int64_t lo = keys, hi = 0;
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t* row = tile + r * bk;
        if (const void* first = memchr(row, 1, lo)) lo = (const uint8_t*)first - row;
        int64_t end = keys;
        for (uint64_t eight; end - 8 >= hi; end -= 8)
            if (memcpy(&eight, row + end - 8, 8), eight) break;
        while (end > hi && !row[end - 1]) end--;
        hi = std::max(hi, end);
    }
    return {lo, hi};
}

// score = scale score + bias, capped, -inf where masked; t is the query of the row, s of its first key, n a multiple of W.
// Returns the greatest, lane by lane.
inline vf biased(const Attention& p, int64_t b, int64_t h, int64_t t, int64_t s, float* x, int64_t n, int64_t keys,
                 const uint8_t* row) {
    const float* table = p.table ? p.table + h * p.table_h + s - t + p.T - 1 : nullptr;
    const float* bias = p.bias ? p.bias + b * p.bias_b + h * p.bias_h + t * p.bias_t + s * p.bias_s : nullptr;
    int64_t whole = keys / W * W;
    vf most = splat(-INF), scale = splat(p.scale);
    float by = p.cap ? 1.0f / p.cap : 0.0f;
    for (int64_t j = 0; j < whole; j += W) {
        vf y = load(x + j) * scale;
        if (table) y += load(table + j);
        if (bias) y += p.bias_s ? load(bias + j) : splat(*bias);
        if (p.cap) y = tanh(y * by) * p.cap;
        if (row) y = allowed(row + j) ? y : splat(-INF);
        store(x + j, y);
        most = max(most, y);
    }
    if (whole == n) return most;
    for (int64_t j = whole; j < n; j++) {
        bool in = j < keys && (!row || row[j]);
        float y = in ? x[j] * p.scale + (table ? table[j] : 0.0f) + (bias ? bias[j * p.bias_s] : 0.0f) : -INF;
        x[j] = in && p.cap ? std::tanh(y * by) * p.cap : y;
    }
    for (int64_t j = whole; j < n; j += W) most = max(most, load(x + j));
    return most;
}

// A Unit multiplies: STRIP queries at most at once, on keys in multiples of GRAIN. It is told of each block of keys, and
// keeps the weights of a strip.
template <class Unit>
void forward_block(const Attention& p, int64_t b, int64_t h, int64_t r, Unit& unit) {
    constexpr int64_t STRIP = Unit::STRIP, GRAIN = Unit::GRAIN;
    alignas(64) float scores[STRIP * MOST];
    int64_t first = r * p.bq, count = std::min(p.bq, p.T - first);
    float top[MOST], total[MOST], *o = unit.o;
    std::fill(top, top + count, -INF);
    std::fill(total, total + count, 0.0f);
    std::fill(o, o + count * p.V, 0.0f);
    unit.at(p, b, h, first, count);
    const bool bare = !p.table && !p.bias && !p.cap && p.scale > 0;
    int64_t line = (b % p.Bm * p.Hm + h % p.Hm) * cut(p.T, p.bq) + r;
    // Of very many keys, every few blocks' sums move to doubles (V values and the weights' total a row): a float to which
    // a million equal weights are added one after another is off by 3e-4.
    const int64_t ld = p.V + 1;
    std::vector<double> far(p.S > FEW ? count * ld : 0);
    auto put_by = [&] {
        for (int64_t i = 0; i < (far.empty() ? 0 : count); i++) {
            for (int64_t d = 0; d < p.V; d++) far[i * ld + d] += o[i * p.V + d];
            far[i * ld + p.V] += total[i];
            std::fill(o + i * p.V, o + (i + 1) * p.V, 0.0f);
            total[i] = 0.0f;
        }
    };
    for (int64_t e = p.row_ptr[line]; e < p.row_ptr[line + 1]; e++) {
        if ((e - p.row_ptr[line]) % 4 == 0) put_by();
        int64_t start = p.cols[e] * p.bk, keys = std::min(p.bk, p.S - start);
        const uint8_t* tile = p.tile[e] < 0 ? nullptr : p.tiles + p.tile[e] * p.bq * p.bk;
        unit.keys(start, keys);
        for (int64_t m = 0; m < count; m += STRIP) {
            int64_t rows = std::min(STRIP, count - m);
            Range range = tile ? seen(tile + m * p.bk, p.bk, rows, keys) : Range{0, keys};
            if (range.lo >= range.hi) continue;
            int64_t lo = range.lo / GRAIN * GRAIN, used = range.hi - lo, width = cut(used, GRAIN) * GRAIN;
            unit.scores(m, rows, start + lo, width, scores);
            for (int64_t i = 0; i < rows; i++) {
                float* x = scores + i * MOST;
                const uint8_t* row = tile ? tile + (m + i) * p.bk + lo : nullptr;
                // Where nothing is added and all is seen, the scale goes into the exponent: scores are not written again.
                bool plain = bare && !row && used == width;
                float scale = plain ? p.scale : 1.0f, was = top[m + i];
                vf best = splat(-INF);
                if (plain)
                    for (int64_t j = 0; j < width; j += W) best = max(best, load(x + j));
                else
                    best = biased(p, b, h, first + m + i, start + lo, x, width, used, row);
                float now = std::max(was, most(best) * scale);
                if (now == -INF) {
                    for (int64_t j = 0; j < width; j += W) unit.weigh(x, i, j, vf{});
                    continue;
                }
                vf mass = {};
                for (int64_t j = 0; j < width; j += W) {
                    vf y = exp<Unit::ROUGH>(load(x + j) * scale - now);
                    unit.weigh(x, i, j, y);
                    mass += y;
                }
                if (now != was) {
                    float keep = std::exp(was - now);
                    float* out = o + (m + i) * p.V;
                    for (int64_t d = 0; d < p.V; d += W) store(out + d, load(out + d) * keep);
                    total[m + i] *= keep;
                    for (int64_t d = 0; d < (far.empty() ? 0 : ld); d++) far[(m + i) * ld + d] *= keep;
                    top[m + i] = now;
                }
                total[m + i] += sum(mass);
            }
            unit.values(m, rows, start + lo, used, scores);
        }
    }
    put_by();
    for (int64_t i = 0; i < (far.empty() ? 0 : count); i++) {
        for (int64_t d = 0; d < p.V; d++) o[i * p.V + d] = float(far[i * ld + d]);
        total[i] = float(far[i * ld + p.V]);
    }
    for (int64_t i = 0; i < count; i++) {
        if (!finite(o + i * p.V, p.V)) *p.odd = 1;
        unit.write(first + i, o + i * p.V, total[i] > 0 ? 1.0f / total[i] : 0.0f);
        p.lse[(b * p.H + h) * p.T + first + i] = total[i] > 0 ? top[i] + std::log(total[i]) : -INF;
    }
}

// All query blocks, shared among the threads of a parallel region.
template <class Unit>
void forward(const Attention& p, Unit& unit) {
    int64_t nq = cut(p.T, p.bq), heads = p.B * p.H;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < heads * nq; i++)
        // Later blocks of a causal layout see more: they go first, so that no thread is left alone with them.
        forward_block(p, i % heads / p.H, i % p.H, nq - 1 - i / heads, unit);
}
}  // namespace
