// Softmax attention over a block layout, forward and backward, in fp32.
//
// Query blocks run in parallel; each walks over the key blocks that its row of the layout stores and keeps a running
// maximum and sum (Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867; tiled as FlashAttention, Dao et al. 2022,
// https://arxiv.org/abs/2205.14135, algorithms 1 and 4). Within a block a strip of queries passes through score,
// bias, mask, exponential and values while it is in the first-level cache.
#include <algorithm>
#include <limits>

#include "simd.h"

namespace {
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t MOST = 256;  // queries or keys in a block, at most
constexpr int64_t STRIP = 2 * MR;  // queries that pass through all steps together

struct View {  // (B, heads, tokens, width), contiguous along width
    float* data;
    int64_t b, h, t;
    float* at(int64_t B, int64_t H, int64_t T) const { return data + B * b + H * h + T * t; }
};
}  // namespace

extern "C" struct Attention {
    int64_t B, H, G, T, S, D, V, threads;
    View q, k, v, out;
    float* lse;      // (B, H, T)
    float* kt;       // scratch: (B, G, panels, D, NR), keys transposed by panels
    float scale;
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
    float *vt, *delta;         // scratch: values transposed as kt; (B, H, T)
    float* dtable;             // (parts, B, H, T + S - 1) or null
    const int64_t *col_ptr, *rows, *entry;  // the layout by columns: query blocks of each key block, and where stored
    int64_t parts;
};

namespace {
int64_t panels(int64_t S) { return (S + NR - 1) / NR; }

// to[panel][d][j] = from[panel * NR + j][d]; keys beyond S are 0.
void transposed(const View& from, float* to, int64_t B, int64_t G, int64_t S, int64_t D) {
    int64_t n = panels(S);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < B * G * n; i++) {
        int64_t p = i % n;
        float* out = to + i * D * NR;
        for (int64_t j = 0; j < NR; j++) {
            int64_t s = p * NR + j;
            const float* in = from.at(i / n / G, i / n % G, s < S ? s : 0);
            for (int64_t d = 0; d < D; d++) out[d * NR + j] = s < S ? in[d] : 0.0f;
        }
    }
}

struct Range { int64_t lo, hi; };

// The keys of a tile that any of these rows may see.
Range seen(const uint8_t* tile, int64_t bk, int64_t rows, int64_t keys) {
    int64_t lo = keys, hi = 0;
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t* row = tile + r * bk;
        int64_t a = 0, z = keys;
        while (a < lo && !row[a]) a++;
        while (z > hi && !row[z - 1]) z--;
        lo = std::min(lo, a);
        hi = std::max(hi, z);
    }
    return {lo, hi};
}

// score = scale score + bias, -inf where masked; t is the query of the row, s of its first key, n a multiple of W.
// Returns the greatest, lane by lane.
inline vf biased(const Attention& p, int64_t b, int64_t h, int64_t t, int64_t s, float* x, int64_t n, int64_t keys,
                 const uint8_t* row) {
    const float* table = p.table ? p.table + h * p.table_h + s - t + p.T - 1 : nullptr;
    const float* bias = p.bias ? p.bias + b * p.bias_b + h * p.bias_h + t * p.bias_t + s * p.bias_s : nullptr;
    int64_t whole = keys / W * W;
    vf most = splat(-INF), scale = splat(p.scale);
    for (int64_t j = 0; j < whole; j += W) {
        vf y = load(x + j) * scale;
        if (table) y += load(table + j);
        if (bias) y += p.bias_s ? load(bias + j) : splat(*bias);
        if (row) y = allowed(row + j) ? y : splat(-INF);
        store(x + j, y);
        most = max(most, y);
    }
    if (whole == n) return most;
    for (int64_t j = whole; j < n; j++) {
        bool in = j < keys && (!row || row[j]);
        x[j] = in ? x[j] * p.scale + (table ? table[j] : 0.0f) + (bias ? bias[j * p.bias_s] : 0.0f) : -INF;
    }
    for (int64_t j = whole; j < n; j += W) most = max(most, load(x + j));
    return most;
}

void forward_block(const Attention& p, int64_t b, int64_t h, int64_t r, float* o) {
    alignas(64) float scores[STRIP * MOST];
    int64_t g = h / (p.H / p.G), first = r * p.bq, count = std::min(p.bq, p.T - first), nq = (p.T + p.bq - 1) / p.bq;
    int64_t n = panels(p.S);
    const float* kt = p.kt + (b * p.G + g) * n * p.D * NR;
    float top[MOST], total[MOST];
    std::fill(top, top + count, -INF);
    std::fill(total, total + count, 0.0f);
    std::fill(o, o + count * p.V, 0.0f);
    int64_t line = (b % p.Bm * p.Hm + h % p.Hm) * nq + r;
    for (int64_t e = p.row_ptr[line]; e < p.row_ptr[line + 1]; e++) {
        int64_t start = p.cols[e] * p.bk, keys = std::min(p.bk, p.S - start);
        const uint8_t* tile = p.tile[e] < 0 ? nullptr : p.tiles + p.tile[e] * p.bq * p.bk;
        for (int64_t m = 0; m < count; m += STRIP) {
            int64_t rows = std::min(STRIP, count - m);
            Range range = tile ? seen(tile + m * p.bk, p.bk, rows, keys) : Range{0, keys};
            if (range.lo >= range.hi) continue;
            int64_t lo = range.lo / NR * NR, width = (range.hi - lo + NR - 1) / NR * NR, used = range.hi - lo;
            product(rows, width, p.D, p.q.at(b, h, first + m), p.q.t, 1, kt + (start + lo) / NR * p.D * NR, NR,
                    p.D * NR, scores, MOST, false);
            for (int64_t i = 0; i < rows; i++) {
                float* x = scores + i * MOST;
                const uint8_t* row = tile ? tile + (m + i) * p.bk + lo : nullptr;
                vf best = biased(p, b, h, first + m + i, start + lo, x, width, used, row);
                float was = top[m + i], now = std::max(was, most(best));
                if (now == -INF) {
                    std::fill(x, x + width, 0.0f);
                    continue;
                }
                vf mass = {};
                for (int64_t j = 0; j < width; j += W) {
                    vf y = exp(load(x + j) - now);
                    store(x + j, y);
                    mass += y;
                }
                if (now != was) {
                    float keep = std::exp(was - now);
                    float* out = o + (m + i) * p.V;
                    for (int64_t d = 0; d < p.V; d += W) store(out + d, load(out + d) * keep);
                    total[m + i] *= keep;
                    top[m + i] = now;
                }
                total[m + i] += sum(mass);
            }
            product(rows, p.V, used, scores, MOST, 1, p.v.at(b, g, start + lo), p.v.t, NR, o + m * p.V, p.V, true);
        }
    }
    for (int64_t i = 0; i < count; i++) {
        float part = total[i] > 0 ? 1.0f / total[i] : 0.0f;
        float* out = p.out.at(b, h, first + i);
        for (int64_t d = 0; d < p.V; d += W) store(out + d, load(o + i * p.V + d) * part);
        p.lse[(b * p.H + h) * p.T + first + i] = total[i] > 0 ? top[i] + std::log(total[i]) : -INF;
    }
}
}  // namespace

extern "C" int regard_lanes() { return W; }
extern "C" int regard_panel() { return NR; }

extern "C" void regard_attention(const Attention* given) {
    const Attention& p = *given;
    int64_t nq = (p.T + p.bq - 1) / p.bq, tasks = p.B * p.H * nq;
#pragma omp parallel num_threads(p.threads)
    {
        transposed(p.k, p.kt, p.B, p.G, p.S, p.D);
        float* o = new (std::align_val_t(64)) float[p.bq * p.V];
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; i++) {
            // Later blocks of a causal layout see more: they go first, so that no thread is left alone with them.
            int64_t r = nq - 1 - i / (p.B * p.H), bh = i % (p.B * p.H);
            forward_block(p, bh / p.H, bh % p.H, r, o);
        }
        operator delete[](o, std::align_val_t(64));
    }
}

namespace {
struct Scratch { float *weights, *ds; };

// One key block against one query block of one head: adds to dk, dv (bk x D, bk x V), dq and dtable.
void backward_block(const Attention& p, int64_t part, int64_t b, int64_t h, int64_t r, int64_t c, int64_t e, float* dk,
                    float* dv, const Scratch& z) {
    int64_t g = h / (p.H / p.G), first = r * p.bq, rows = std::min(p.bq, p.T - first), start = c * p.bk;
    int64_t keys = std::min(p.bk, p.S - start), width = (keys + NR - 1) / NR * NR, n = panels(p.S), ld = p.bk;
    const uint8_t* tile = p.tile[e] < 0 ? nullptr : p.tiles + p.tile[e] * p.bq * p.bk;
    float *q = p.q.at(b, h, first), *grad = p.grad.at(b, h, first), *dq = p.dq.at(b, h, first) + part * p.B * p.dq.b;
    product(rows, width, p.D, q, p.q.t, 1, p.kt + ((b * p.G + g) * n + start / NR) * p.D * NR, NR, p.D * NR, z.weights,
            ld, false);
    product(rows, width, p.V, grad, p.grad.t, 1, p.vt + ((b * p.G + g) * n + start / NR) * p.V * NR, NR, p.V * NR, z.ds,
            ld, false);
    for (int64_t i = 0; i < rows; i++) {
        int64_t row = (b * p.H + h) * p.T + first + i;
        float *x = z.weights + i * ld, *ds = z.ds + i * ld, lse = p.lse[row], delta = p.delta[row];
        (void)biased(p, b, h, first + i, start, x, width, keys, tile ? tile + i * p.bk : nullptr);
        lse = lse == -INF ? 0.0f : lse;  // such a row has only -inf scores, so its weights are 0
        for (int64_t j = 0; j < width; j += W) {
            vf y = exp(load(x + j) - lse);
            store(x + j, y);
            store(ds + j, y * (load(ds + j) - delta));
        }
        if (p.dtable) {
            float* to = p.dtable + ((part * p.B + b) * p.H + h) * (p.T + p.S - 1) + start - first - i + p.T - 1;
            for (int64_t j = 0; j < keys; j++) to[j] += ds[j];
        }
        for (int64_t j = 0; j < width; j += W) store(ds + j, load(ds + j) * p.scale);
    }
    product(keys, p.V, rows, z.weights, 1, ld, grad, p.grad.t, NR, dv, p.V, true);
    product(keys, p.D, rows, z.ds, 1, ld, q, p.q.t, NR, dk, p.D, true);
    product(rows, p.D, keys, z.ds, ld, 1, p.k.at(b, g, start), p.k.t, NR, dq, p.dq.t, true);
}
}  // namespace

extern "C" void regard_attention_backward(const Attention* given) {
    const Attention& p = *given;
    int64_t nk = (p.S + p.bk - 1) / p.bk, group = p.H / p.G;
#pragma omp parallel num_threads(p.threads)
    {
        transposed(p.k, p.kt, p.B, p.G, p.S, p.D);
        transposed(p.v, p.vt, p.B, p.G, p.S, p.V);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.B * p.H * p.T; i++) {
            int64_t b = i / p.T / p.H, h = i / p.T % p.H, t = i % p.T;
            const float *x = p.grad.at(b, h, t), *y = p.out.at(b, h, t);
            vf s = {};
            for (int64_t d = 0; d < p.V; d += W) s += load(x + d) * load(y + d);
            p.delta[i] = sum(s);
        }
        auto room = [](int64_t n) { return new (std::align_val_t(64)) float[n]; };
        auto done = [](float* x) { operator delete[](x, std::align_val_t(64)); };
        Scratch z = {room(p.bq * p.bk), room(p.bq * p.bk)};
        float *dk = room(p.bk * p.D), *dv = room(p.bk * p.V);
        // Only one task adds to a part of dq; a part's key blocks lie apart, so that causal parts weigh alike.
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < p.B * p.G * p.parts; i++) {
            int64_t part = i % p.parts, b = i / p.parts / p.G, g = i / p.parts % p.G;
            for (int64_t c = part; c < nk; c += p.parts) {
                std::fill(dk, dk + p.bk * p.D, 0.0f);
                std::fill(dv, dv + p.bk * p.V, 0.0f);
                for (int64_t h = g * group; h < (g + 1) * group; h++) {
                    int64_t line = (b % p.Bm * p.Hm + h % p.Hm) * nk + c;
                    for (int64_t e = p.col_ptr[line]; e < p.col_ptr[line + 1]; e++)
                        backward_block(p, part, b, h, p.rows[e], c, p.entry[e], dk, dv, z);
                }
                for (int64_t s = 0; s < std::min(p.bk, p.S - c * p.bk); s++) {
                    std::copy(dk + s * p.D, dk + (s + 1) * p.D, p.dk.at(b, g, c * p.bk + s));
                    std::copy(dv + s * p.V, dv + (s + 1) * p.V, p.dv.at(b, g, c * p.bk + s));
                }
            }
        }
        done(z.weights), done(z.ds), done(dk), done(dv);
    }
}
