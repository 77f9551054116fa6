// One query a head against keys and values in pages, read where they lie.
//
// A row's keys are cut into parts, which run in parallel; a part keeps a running maximum and sum over stretches of pages,
// and parts are put together by their maxima. Sums over stretches are kept in doubles, as they may be many.
#include "attention.h"

extern "C" struct Paged {
    int64_t B, H, G, S, D, V, page, threads, parts;
    const float *q;               // (B, H, D)
    const float *k, *v;           // (pages, G, page, D or V)
    const int32_t* const* table;  // of each row its pages, in order
    const int64_t *start, *count; // of each row: where in its pages it begins, and how many keys it has
    const uint8_t* mask;          // or null: of head h in row b at mask + b mask_b + h mask_h, S long; rows stand at its end
    int64_t mask_b, mask_h;
    float scale;
    float* out;                   // (B, H, V)
    double* partial;              // scratch: (B, H, parts, V + 2)
    int32_t* odd;                 // set to 1 where a score or an output is NaN or infinite
};

namespace {
constexpr int64_t STRETCH = 256, RUN = 64;  // keys whose scores are held at once; that are added one after another

// s[r][j] = q[r] . k[j]: each key is fetched once for R queries.
template <int R>
void dots(const float* q, const float* k, int64_t n, int64_t D, float* s, int64_t ld) {
    const int64_t whole = D / W * W;
    constexpr int K = W / R;
    int64_t j = 0;
    if (whole == D)  // W sums are finished together
        for (; j + K <= n; j += K, k += K * D) {
            vf acc[W] = {};
            for (int64_t d = 0; d < D; d += W)
#pragma GCC unroll 16
                for (int i = 0; i < K; i++) {
                    vf x = load(k + i * D + d);
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++) acc[r * K + i] += x * load(q + r * D + d);
                }
            vf all = sums(acc);
            for (int r = 0; r < R; r++) memcpy(s + r * ld + j, (const char*)&all + r * K * sizeof(float), K * sizeof(float));
        }
    for (; j < n; j++, k += D) {
        vf acc[R] = {};
        for (int64_t d = 0; d < whole; d += W) {
            vf x = load(k + d);
            for (int r = 0; r < R; r++) acc[r] += x * load(q + r * D + d);
        }
        for (int r = 0; r < R; r++) {
            float rest = sum(acc[r]);
            for (int64_t d = whole; d < D; d++) rest += q[r * D + d] * k[d];
            s[r * ld + j] = rest;
        }
    }
}

// o += w v, but for values that are hidden: 0 times NaN is NaN.
template <int N>
inline void sums(const float* w, const float* v, int64_t n, int64_t V, float* o, const uint8_t* seen) {
    vf acc[N] = {};
    for (int64_t j = 0; j < n; j++, v += V) {
        if (seen && !seen[j]) continue;
        vf x = splat(w[j]);
        for (int i = 0; i < N; i++) acc[i] += x * load(v + i * W);
    }
    for (int i = 0; i < N; i++) store(o + i * W, load(o + i * W) + acc[i]);
}

void mixed(const float* w, const float* v, int64_t n, int64_t V, float* o, const uint8_t* seen) {
    int64_t d = 0;
    for (; d + 4 * W <= V; d += 4 * W) sums<4>(w, v + d, n, V, o + d, seen);
    for (; d + W <= V; d += W) sums<1>(w, v + d, n, V, o + d, seen);
    for (; d < V; d++)
        for (int64_t j = 0; j < n; j++)
            if (!seen || seen[j]) o[d] += w[j] * v[j * V + d];
}

// x = scale x, -inf where hidden and behind the end; gives the greatest, and tells of what is not finite.
float scaled(float* x, int64_t n, float scale, const uint8_t* seen, int32_t* odd) {
    vf best = splat(-INF), probe = {};
    for (int64_t j = n; j < cut(n, W) * W; j++) x[j] = 0.0f;
    for (int64_t j = 0; j < n; j += W) {
        vf y = load(x + j) * scale;
        uint8_t last[W] = {};
        if (j + W > n) {
            for (int64_t i = j; i < n; i++) last[i - j] = !seen || seen[i];
        }
        const uint8_t* in = j + W > n ? last : seen ? seen + j : nullptr;
        probe += in ? (allowed(in) ? y * 0.0f : vf{}) : y * 0.0f;
        if (in) y = allowed(in) ? y : splat(-INF);
        store(x + j, y);
        best = max(best, y);
    }
    if (sum(probe) != 0 || sum(probe) != sum(probe)) *odd = 1;
    return most(best);
}

struct At { const float *k, *v; int64_t n; };

// The keys of row b from `token` of its pages on, as far as its page goes and a run is long.
inline At at(const Paged& p, int64_t b, int64_t g, int64_t token, int64_t left) {
    int64_t in = token % p.page, page = (int64_t(p.table[b][token / p.page]) * p.G + g) * p.page + in;
    return {p.k + page * p.D, p.v + page * p.V, std::min({p.page - in, left, RUN})};
}

void part(const Paged& p, int64_t b, int64_t g, int64_t i, float* scratch) {
    const int64_t R = p.H / p.G, count = p.count[b], first = p.start[b], ld = STRETCH + W;
    const int64_t lo = count * i / p.parts, hi = count * (i + 1) / p.parts;
    float *s = scratch, *o = scratch + R * ld;
    const float* q = p.q + (b * p.H + g * R) * p.D;
    auto held_of = [&](int64_t r) { return p.partial + ((b * p.H + g * R + r) * p.parts + i) * (p.V + 2); };
    for (int64_t r = 0; r < R; r++) {
        std::fill(held_of(r), held_of(r) + p.V + 2, 0.0);
        held_of(r)[0] = -INF;
    }
    for (int64_t from = lo, to; from < hi; from = to) {
        to = std::min(hi, from + STRETCH);
        const int64_t n = to - from;
        for (int64_t j = 0; j < n;) {
            At keys = at(p, b, g, first + from + j, n - j);
            int64_t r = 0;
            for (; r + 4 <= R; r += 4) dots<4>(q + r * p.D, keys.k, keys.n, p.D, s + r * ld + j, ld);
            for (; r < R; r++) dots<1>(q + r * p.D, keys.k, keys.n, p.D, s + r * ld + j, ld);
            j += keys.n;
        }
        for (int64_t r = 0; r < R; r++) {
            float* x = s + r * ld;
            double* held = held_of(r);
            const uint8_t* seen = p.mask ? p.mask + b * p.mask_b + (g * R + r) * p.mask_h + p.S - count + from : nullptr;
            const float best = scaled(x, n, p.scale, seen, p.odd), now = std::max(float(held[0]), best);
            if (now == -INF) continue;
            vf mass = {};
            for (int64_t j = 0; j < n; j += W) {
                vf y = exp(load(x + j) - now);
                store(x + j, y);
                mass += y;
            }
            std::fill(o, o + p.V, 0.0f);
            for (int64_t j = 0; j < n;) {
                At keys = at(p, b, g, first + from + j, n - j);
                mixed(x + j, keys.v, keys.n, p.V, o, seen ? seen + j : nullptr);
                j += keys.n;
            }
            const double keep = std::exp(held[0] - now);
            held[0] = now;
            held[1] = held[1] * keep + sum(mass);
            for (int64_t d = 0; d < p.V; d++) held[2 + d] = held[2 + d] * keep + o[d];
        }
    }
}

void merged(const Paged& p, int64_t head) {
    const double* held = p.partial + head * p.parts * (p.V + 2);
    double top = -INF, total = 0;
    for (int64_t i = 0; i < p.parts; i++) top = std::max(top, held[i * (p.V + 2)]);
    float* out = p.out + head * p.V;
    std::fill(out, out + p.V, 0.0f);
    for (int64_t i = 0; i < p.parts; i++) total += top == -INF ? 0 : held[i * (p.V + 2) + 1] * std::exp(held[i * (p.V + 2)] - top);
    if (total == 0) return;
    for (int64_t d = 0; d < p.V; d++) {
        double y = 0;
        for (int64_t i = 0; i < p.parts; i++) y += held[i * (p.V + 2) + 2 + d] * std::exp(held[i * (p.V + 2)] - top);
        out[d] = float(y / total);
        if (!(out[d] * 0.0f == 0.0f)) *p.odd = 1;
    }
}
}  // namespace

extern "C" void regard_paged(const Paged* given) {
    const Paged& p = *given;
#pragma omp parallel num_threads(p.threads)
    {
        float* scratch = new (std::align_val_t(64)) float[p.H / p.G * (STRETCH + W) + p.V];
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < p.B * p.G * p.parts; i++)
            part(p, i / p.parts / p.G, i / p.parts % p.G, i % p.parts, scratch);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.B * p.H; i++) merged(p, i);
        operator delete[](scratch, std::align_val_t(64));
    }
}
