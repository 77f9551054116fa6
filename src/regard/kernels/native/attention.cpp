// Softmax attention over a block layout in fp32: forward as attention.h has it, and backward, which computes the weights
// again from the log-sum-exp: each key block is visited once, by the queries that see it.
#include "attention.h"

namespace {
// Numbers come as `kind` says; all is computed in fp32, and what is narrower is widened block by block.
inline void* at(const View& x, int64_t kind, int64_t b, int64_t h, int64_t t) {
    return kind == FP32 ? (void*)x.at(b, h, t) : x.at<bf16>(b, h, t);
}

template <class Number>
void copied(const Number* from, float* to, int64_t n) {
    for (int64_t j = 0; j < n; j += W) store(to + j, load(from + j));
}
template <class Number>
void scaled(const float* from, float by, Number* to, int64_t n) {
    for (int64_t j = 0; j < n; j += W) store(to + j, load(from + j) * by);
}
#ifndef FP16
void copied(const fp16*, float*, int64_t) {}
void scaled(const float*, float, fp16*, int64_t) {}
#endif

// n numbers, a multiple of W, in fp32: where they lie, or in `to`.
inline const float* widened(int64_t kind, const void* from, float* to, int64_t n) {
    if (kind == FP32) return (const float*)from;
    kind == BF16 ? copied((const bf16*)from, to, n) : copied((const fp16*)from, to, n);
    return to;
}

// Rows of a width, in fp32, and how far they lie apart.
struct Rows { const float* at; int64_t apart; };
Rows widened(int64_t kind, const View& from, int64_t b, int64_t h, int64_t t, float* to, int64_t rows, int64_t width) {
    if (kind == FP32) return {from.at(b, h, t), from.t};
    for (int64_t i = 0; i < rows; i++) widened(kind, at(from, kind, b, h, t + i), to + i * width, width);
    return {to, width};
}

// to = by * from in its own kind.
inline void written(int64_t kind, const float* from, float by, void* to, int64_t n) {
    if (kind == FP32) return scaled(from, by, (float*)to, n);
    kind == BF16 ? scaled(from, by, (bf16*)to, n) : scaled(from, by, (fp16*)to, n);
}

inline float* room(int64_t n) { return new (std::align_val_t(64)) float[n]; }
inline void done(float* x) { operator delete[](x, std::align_val_t(64)); }

// to[panel][d][j] = from[panel * NR + j][d]; keys beyond S are 0.
void transposed(int64_t kind, const View& from, float* to, int64_t B, int64_t G, int64_t S, int64_t D, int32_t* odd) {
    int64_t n = cut(S, NR);
    std::vector<float> row(D);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < B * G * n; i++) {
        int64_t p = i % n;
        float* out = to + i * D * NR;
        for (int64_t j = 0; j < NR; j++) {
            int64_t s = p * NR + j;
            const float* in = widened(kind, at(from, kind, i / n / G, i / n % G, s < S ? s : 0), row.data(), D);
            if (odd && !finite(in, D)) *odd = 1;
            for (int64_t d = 0; d < D; d++) out[d * NR + j] = s < S ? in[d] : 0.0f;
        }
    }
}

struct Fp32 {
    static constexpr int64_t STRIP = 2 * MR, GRAIN = NR;
    static constexpr bool ROUGH = false;
    const Attention* p;
    float *o, *wide, *tall;
    Rows q, v;
    const float* kt;
    int64_t b, h, start;

    explicit Fp32(const Attention& p) : o(room(p.bq * p.V)), wide(room(p.bq * p.D)), tall(room(p.bk * p.V)) {}
    ~Fp32() { done(o), done(wide), done(tall); }
    void at(const Attention& given, int64_t batch, int64_t head, int64_t first, int64_t count) {
        p = &given, b = batch, h = head;
        int64_t g = h / (p->H / p->G);
        q = widened(p->kind, p->q, b, h, first, wide, count, p->D);
        kt = (const float*)p->kt + (b * p->G + g) * cut(p->S, NR) * NR * p->D;
        for (int64_t i = 0; i < count; i++)
            if (!finite(q.at + i * q.apart, p->D)) *p->odd = 1;
    }
    void keys(int64_t s, int64_t count) {
        start = s, v = widened(p->kind, p->v, b, h / (p->H / p->G), s, tall, count, p->V);
    }
    void scores(int64_t m, int64_t rows, int64_t s, int64_t width, float* x) {
        product(rows, width, p->D, q.at + m * q.apart, q.apart, 1, kt + s * p->D, NR, NR * p->D, x, MOST, false);
    }
    void weigh(float* x, int64_t, int64_t j, vf y) { store(x + j, y); }
    void values(int64_t m, int64_t rows, int64_t s, int64_t used, const float* x) {
        product(rows, p->V, used, x, MOST, 1, v.at + (s - start) * v.apart, v.apart, NR, o + m * p->V, p->V, true);
    }
    void write(int64_t t, const float* from, float by) {
        written(p->kind, from, by, ::at(p->out, p->kind, b, h, t), p->V);
    }
};
}  // namespace

extern "C" int regard_fp16() {
#ifdef FP16
    return 1;
#else
    return 0;
#endif
}

extern "C" int regard_lanes() { return W; }

extern "C" void regard_attention(const Attention* p) {
#pragma omp parallel num_threads(p->threads)
    {
        transposed(p->kind, p->k, (float*)p->kt, p->B, p->G, p->S, p->D, p->odd);
        Fp32 unit(*p);
        forward(*p, unit);
    }
}

namespace {
struct Scratch { float *weights, *ds, *q, *grad, *k; };

// One key block against one query block of one head: adds to dk, dv (bk x D, bk x V), dq and dtable.
void backward_block(const Attention& p, int64_t part, int64_t b, int64_t h, int64_t r, int64_t c, int64_t e,
                    const Rows& k, float* dk, float* dv, const Scratch& z) {
    int64_t g = h / (p.H / p.G), first = r * p.bq, rows = std::min(p.bq, p.T - first), start = c * p.bk;
    int64_t keys = std::min(p.bk, p.S - start), width = cut(keys, NR) * NR, ld = p.bk;
    int64_t from = (b * p.G + g) * cut(p.S, NR) * NR + start;
    const uint8_t* tile = p.tile[e] < 0 ? nullptr : p.tiles + p.tile[e] * p.bq * p.bk;
    Rows q = widened(p.kind, p.q, b, h, first, z.q, rows, p.D);
    Rows grad = widened(p.kind, p.grad, b, h, first, z.grad, rows, p.V);
    float* dq = p.dq.at(b, h, first) + part * p.B * p.dq.b;
    product(rows, width, p.D, q.at, q.apart, 1, (const float*)p.kt + from * p.D, NR, p.D * NR, z.weights,
            ld, false);
    product(rows, width, p.V, grad.at, grad.apart, 1, (const float*)p.vt + from * p.V, NR, p.V * NR, z.ds,
            ld, false);
    for (int64_t i = 0; i < rows; i++) {
        int64_t row = (b * p.H + h) * p.T + first + i;
        float *x = z.weights + i * ld, *ds = z.ds + i * ld, lse = p.lse[row], delta = p.delta[row];
        // Where one key has all the weight, dp - delta is dlse: nothing is left but that, and the rounding of two sums.
        vf alone = vf{} + (p.dlse ? p.dlse[row] : 0.0f);
        (void)biased(p, b, h, first + i, start, x, width, keys, tile ? tile + i * p.bk : nullptr);
        lse = lse == -INF ? 0.0f : lse;  // such a row has only -inf scores, so its weights are 0
        for (int64_t j = 0; j < width; j += W) {
            vf score = load(x + j), y = exp(score - lse);
            store(x + j, y);
            vf d = y == 1.0f ? alone : y * (load(ds + j) - delta);
            if (p.cap) {
                vf part = max(score * (1.0f / p.cap), splat(-1.0f));  // masked ones are -inf
                d *= 1.0f - part * part;
            }
            store(ds + j, d);
        }
        if (p.dtable) {
            float* to = p.dtable + ((part * p.B + b) * p.H + h) * (p.T + p.S - 1) + start - first - i + p.T - 1;
            for (int64_t j = 0; j < keys; j++) to[j] += ds[j];
        }
        for (int64_t j = 0; j < width; j += W) store(ds + j, load(ds + j) * p.scale);
    }
    product(keys, p.V, rows, z.weights, 1, ld, grad.at, grad.apart, NR, dv, p.V, true);
    product(keys, p.D, rows, z.ds, 1, ld, q.at, q.apart, NR, dk, p.D, true);
    product(rows, p.D, keys, z.ds, ld, 1, k.at, k.apart, NR, dq, p.dq.t, true);
}
}  // namespace

extern "C" void regard_attention_backward(const Attention* given) {
    const Attention& p = *given;
    int64_t nk = cut(p.S, p.bk), group = p.H / p.G;
#pragma omp parallel num_threads(p.threads)
    {
        transposed(p.kind, p.k, (float*)p.kt, p.B, p.G, p.S, p.D, nullptr);
        transposed(p.kind, p.v, (float*)p.vt, p.B, p.G, p.S, p.V, nullptr);
        std::vector<float> left(p.V), right(p.V);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.B * p.H * p.T; i++) {
            int64_t b = i / p.T / p.H, h = i / p.T % p.H, t = i % p.T;
            const float* x = widened(p.kind, at(p.grad, p.kind, b, h, t), left.data(), p.V);
            const float* y = widened(p.kind, at(p.out, p.kind, b, h, t), right.data(), p.V);
            vf s = {};
            for (int64_t d = 0; d < p.V; d += W) s += load(x + d) * load(y + d);
            p.delta[i] = sum(s) - (p.dlse ? p.dlse[i] : 0.0f);
        }
        Scratch z = {room(p.bq * p.bk), room(p.bq * p.bk), room(p.bq * p.D), room(p.bq * p.V), room(p.bk * p.D)};
        float *dk = room(p.bk * p.D), *dv = room(p.bk * p.V);
        // Only one task adds to a part of dq; a part's key blocks lie apart, so that causal parts weigh alike.
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < p.B * p.G * p.parts; i++) {
            int64_t part = i % p.parts, b = i / p.parts / p.G, g = i / p.parts % p.G;
            for (int64_t c = part; c < nk; c += p.parts) {
                std::fill(dk, dk + p.bk * p.D, 0.0f);
                std::fill(dv, dv + p.bk * p.V, 0.0f);
                int64_t start = c * p.bk, keys = std::min(p.bk, p.S - start);
                Rows k = widened(p.kind, p.k, b, g, start, z.k, keys, p.D);
                for (int64_t h = g * group; h < (g + 1) * group; h++) {
                    int64_t line = (b % p.Bm * p.Hm + h % p.Hm) * nk + c;
                    for (int64_t e = p.col_ptr[line]; e < p.col_ptr[line + 1]; e++)
                        backward_block(p, part, b, h, p.rows[e], c, p.entry[e], k, dk, dv, z);
                }
                for (int64_t s = 0; s < keys; s++) {
                    written(p.kind, dk + s * p.D, 1.0f, at(p.dk, p.kind, b, g, start + s), p.D);
                    written(p.kind, dv + s * p.V, 1.0f, at(p.dv, p.kind, b, g, start + s), p.V);
                }
            }
        }
        for (float* x : {z.weights, z.ds, z.q, z.grad, z.k, dk, dv}) done(x);
    }
}
