// Softmax attention over a block layout in fp32: forward as attention.h has it, and backward, which computes the weights
// again from the log-sum-exp: each key block is visited once, by the queries that see it.
#include "attention.h"

namespace {
// to[panel][d][j] = from[panel * NR + j][d]; keys beyond S are 0.
void transposed(const View& from, float* to, int64_t B, int64_t G, int64_t S, int64_t D, int32_t* odd) {
    int64_t n = cut(S, NR);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < B * G * n; i++) {
        int64_t p = i % n;
        float* out = to + i * D * NR;
        for (int64_t j = 0; j < NR; j++) {
            int64_t s = p * NR + j;
            const float* in = from.at(i / n / G, i / n % G, s < S ? s : 0);
            if (odd && !finite(in, D)) *odd = 1;
            for (int64_t d = 0; d < D; d++) out[d * NR + j] = s < S ? in[d] : 0.0f;
        }
    }
}

struct Fp32 {
    static constexpr int64_t STRIP = 2 * MR, GRAIN = NR;
    static constexpr bool ROUGH = false;
    const Attention* p;
    float *o, *q, *v;
    const float* kt;
    View out;

    explicit Fp32(const Attention& p) : o(new (std::align_val_t(64)) float[p.bq * p.V]) {}
    ~Fp32() { operator delete[](o, std::align_val_t(64)); }
    void at(const Attention& given, int64_t b, int64_t h, int64_t first, int64_t count) {
        int64_t g = h / (given.H / given.G);
        p = &given;
        q = p->q.at(b, h, first), v = p->v.at(b, g, 0), out = {p->out.at(b, h, 0), 0, 0, p->out.t};
        kt = (const float*)p->kt + (b * p->G + g) * cut(p->S, NR) * NR * p->D;
        for (int64_t i = 0; i < count; i++)
            if (!finite(q + i * p->q.t, p->D)) *p->odd = 1;
    }
    void scores(int64_t m, int64_t rows, int64_t s, int64_t width, float* x) {
        product(rows, width, p->D, q + m * p->q.t, p->q.t, 1, kt + s * p->D, NR, NR * p->D, x, MOST, false);
    }
    void values(int64_t m, int64_t rows, int64_t s, int64_t used, const float* x) {
        product(rows, p->V, used, x, MOST, 1, v + s * p->v.t, p->v.t, NR, o + m * p->V, p->V, true);
    }
    void write(int64_t t, const float* from, float by) {
        for (int64_t d = 0; d < p->V; d += W) store(out.at(0, 0, t) + d, load(from + d) * by);
    }
};
}  // namespace

extern "C" int regard_lanes() { return W; }

extern "C" void regard_attention(const Attention* p) {
#pragma omp parallel num_threads(p->threads)
    {
        transposed(p->k, (float*)p->kt, p->B, p->G, p->S, p->D, p->odd);
        Fp32 unit(*p);
        forward(*p, unit);
    }
}

namespace {
struct Scratch { float *weights, *ds; };

// One key block against one query block of one head: adds to dk, dv (bk x D, bk x V), dq and dtable.
void backward_block(const Attention& p, int64_t part, int64_t b, int64_t h, int64_t r, int64_t c, int64_t e, float* dk,
                    float* dv, const Scratch& z) {
    int64_t g = h / (p.H / p.G), first = r * p.bq, rows = std::min(p.bq, p.T - first), start = c * p.bk;
    int64_t keys = std::min(p.bk, p.S - start), width = cut(keys, NR) * NR, ld = p.bk;
    int64_t from = (b * p.G + g) * cut(p.S, NR) * NR + start;
    const uint8_t* tile = p.tile[e] < 0 ? nullptr : p.tiles + p.tile[e] * p.bq * p.bk;
    float *q = p.q.at(b, h, first), *grad = p.grad.at(b, h, first), *dq = p.dq.at(b, h, first) + part * p.B * p.dq.b;
    product(rows, width, p.D, q, p.q.t, 1, (const float*)p.kt + from * p.D, NR, p.D * NR, z.weights,
            ld, false);
    product(rows, width, p.V, grad, p.grad.t, 1, (const float*)p.vt + from * p.V, NR, p.V * NR, z.ds,
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
    product(keys, p.V, rows, z.weights, 1, ld, grad, p.grad.t, NR, dv, p.V, true);
    product(keys, p.D, rows, z.ds, 1, ld, q, p.q.t, NR, dk, p.D, true);
    product(rows, p.D, keys, z.ds, ld, 1, p.k.at(b, g, start), p.k.t, NR, dq, p.dq.t, true);
}
}  // namespace

extern "C" void regard_attention_backward(const Attention* given) {
    const Attention& p = *given;
    int64_t nk = cut(p.S, p.bk), group = p.H / p.G;
#pragma omp parallel num_threads(p.threads)
    {
        transposed(p.k, (float*)p.kt, p.B, p.G, p.S, p.D, nullptr);
        transposed(p.v, (float*)p.vt, p.B, p.G, p.S, p.V, nullptr);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.B * p.H * p.T; i++) {
            int64_t b = i / p.T / p.H, h = i / p.T % p.H, t = i % p.T;
            const float *x = p.grad.at(b, h, t), *y = p.out.at(b, h, t);
            vf s = {};
            for (int64_t d = 0; d < p.V; d += W) s += load(x + d) * load(y + d);
            p.delta[i] = sum(s) - (p.dlse ? p.dlse[i] : 0.0f);
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
