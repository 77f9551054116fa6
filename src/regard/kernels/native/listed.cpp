// Softmax attention where runs of queries have lists of single keys, in fp32, forward and backward.
//
// A run of many queries gathers its keys, a panel at a time, and multiplies matrices: scores lie keys down and queries
// across, so that a row of the softmax is a lane of a vector. Queries with lists of their own take dot products with the
// keys where these lie. What a run's queries see of one key is an interval: causality, windows and keys that go out of
// sight are no more than that. Backward computes the weights again from the log-sum-exp.
#include "attention.h"

extern "C" struct Listed {
    int64_t B, H, G, T, S, D, V, threads;  // D and V are multiples of W
    View q, k, v, out;
    float* lse;                  // (B, H, T)
    int64_t run, Bm, Hm, most;   // queries of a run; lists of each batch row and head, or of all; keys of a list
    const int64_t* ptr;          // where each run's list starts, (Bm Hm runs + 1); null: list n starts at n * most
    const int32_t* cols;         // keys; what is negative, beyond S or there already is none
    const int32_t* until;        // (Bu, Hu, S) or null: key s is seen by positions before until
    int64_t Bu, Hu;
    int64_t back, ahead;         // all that is seen: -ahead <= i - j <= back
    int64_t prefix;              // seen besides what the lists hold: the first keys
    int64_t near_back, near_ahead;  // and a band, where -near_ahead <= near_back
    const uint8_t* keep;         // (Bk, S) or null: 0 where a key is hidden
    int64_t Bk;
    const float* bias;           // added to the scores: bias[b * bias_b + h * bias_h + s * bias_s], if not null
    int64_t bias_b, bias_h, bias_s;
    double scale;
    View grad, dq, dk, dv;       // backward: dk and dv are (parts, B, H, S, width), zero before
    float* dbias;                // (parts, B, H, S), zero before, or null
    int64_t parts;
};

namespace {
constexpr int64_t ROWS = 128, PANEL = 64, ALONE = 8;  // queries and keys multiplied together; shorter runs aren't worth it
constexpr int64_t FLUSH = 4096;                       // keys whose sums a float holds, of lists that are very long

inline float* room(int64_t n) { return new (std::align_val_t(64)) float[n]; }
inline void done(float* x) { operator delete[](x, std::align_val_t(64)); }

struct Item { int32_t key, lo, hi; };  // seen by these queries, counted from the first at hand

// The keys of some queries, each once.
struct Seen {
    std::vector<int32_t> stamp;
    std::vector<Item> items;
    int32_t now = 0;
    explicit Seen(int64_t S) : stamp(S, 0) {}

    inline void add(const Listed& p, int64_t b, int64_t h, int64_t i, int64_t count, int64_t j, int64_t lo, int64_t hi) {
        stamp[j] = now;
        if (p.keep && !p.keep[b % p.Bk * p.S + j]) return;
        lo = std::max(lo, j - p.ahead - i), hi = std::min(hi, j + p.back + 1 - i);
        if (p.until) hi = std::min<int64_t>(hi, p.until[(b % p.Bu * p.Hu + h % p.Hu) * p.S + j] - i);
        lo = std::max<int64_t>(lo, 0), hi = std::min(hi, count);
        if (lo >= hi) return;
        items.push_back({int32_t(j), int32_t(lo), int32_t(hi)});
    }

    // Of queries t .. t + count - 1, all of one run.
    void of(const Listed& p, int64_t b, int64_t h, int64_t t, int64_t count) {
        int64_t line = (b % p.Bm * p.Hm + h % p.Hm) * cut(p.T, p.run) + t / p.run, i = t + p.S - p.T;
        int64_t from = p.ptr ? p.ptr[line] : line * p.most, to = p.ptr ? p.ptr[line + 1] : from + p.most;
        now++, items.clear();
        for (int64_t e = from; e < to; e++) {
            int64_t j = p.cols[e];
            if (j >= 0 && j < p.S && stamp[j] != now) add(p, b, h, i, count, j, 0, count);
        }
        for (int64_t j = 0; j < std::min(p.prefix, p.S); j++)
            if (stamp[j] != now) add(p, b, h, i, count, j, 0, count);
        if (p.near_back < -p.near_ahead) return;
        int64_t first = std::max<int64_t>(0, i - p.near_back), end = std::min(p.S, i + count + p.near_ahead);
        for (int64_t j = first; j < end; j++)
            if (stamp[j] != now) add(p, b, h, i, count, j, j - p.near_ahead - i, j + p.near_back + 1 - i);
    }
};

inline float bias_of(const Listed& p, int64_t b, int64_t h, int64_t j) {
    return p.bias ? p.bias[b * p.bias_b + h * p.bias_h + j * p.bias_s] : 0.0f;
}

inline vf lanes() {
    vf x = {};
    for (int i = 0; i < W; i++) x[i] = float(i);
    return x;
}

// to[panel][d][t] = by * rows of q; queries beyond `count` are 0.
void turned(const View& from, int64_t b, int64_t h, int64_t t, int64_t count, int64_t wide, int64_t D, float by, float* to) {
    for (int64_t r = 0; r < wide; r++) {
        float* at = to + r / NR * NR * D + r % NR;
        const float* row = r < count ? from.at(b, h, t + r) : nullptr;
        for (int64_t d = 0; d < D; d++) at[d * NR] = row ? row[d] * by : 0.0f;
    }
}

inline void gathered(const View& from, int64_t b, int64_t g, const Item* items, int64_t n, int64_t width, float* to) {
    for (int64_t k = 0; k < n; k++) memcpy(to + k * width, from.at(b, g, items[k].key), width * sizeof(float));
}

// What is not seen becomes -inf, and what is gets its bias.
inline vf shown(vf x, const Item& item, int64_t c, float bias, bool partly) {
    x += bias;
    if (!partly) return x;
    const vf at = lanes() + float(c);
    x = at >= float(item.lo) ? x : splat(-INF);
    return at < float(item.hi) ? x : splat(-INF);
}

struct Room {
    float *q, *k, *v, *x, *o, *top, *total, *keep, *ds, *grad, *rows;
    float bias[PANEL];
    Seen seen;
    std::vector<double> far;
    Room(const Listed& p)
        : q(room(ROWS * p.D)), k(room(PANEL * p.D)), v(room(PANEL * p.V)), x(room(PANEL * ROWS)), o(room(ROWS * p.V)),
          top(room(ROWS)), total(room(ROWS)), keep(room(ROWS)), ds(room(PANEL * ROWS)), grad(room(ROWS * p.V)),
          rows(room(ROWS * (p.D + p.V))), seen(p.S) {}
    ~Room() {
        for (float* z : {q, k, v, x, o, top, total, keep, ds, grad, rows}) done(z);
    }
};

void together(const Listed& p, int64_t b, int64_t h, int64_t t, int64_t count, Room& z) {
    const int64_t g = h / (p.H / p.G), wide = cut(count, NR) * NR, n = z.seen.items.size(), ld = p.V + 1;
    turned(p.q, b, h, t, count, wide, p.D, float(p.scale), z.q);
    std::fill(z.o, z.o + count * p.V, 0.0f);
    std::fill(z.top, z.top + wide, -INF);
    std::fill(z.total, z.total + wide, 0.0f);
    z.far.assign(n > FEW ? count * ld : 0, 0.0);
    auto put_by = [&] {
        for (int64_t r = 0; r < count; r++) {
            for (int64_t d = 0; d < p.V; d++) z.far[r * ld + d] += z.o[r * p.V + d];
            z.far[r * ld + p.V] += z.total[r];
            std::fill(z.o + r * p.V, z.o + (r + 1) * p.V, 0.0f);
            z.total[r] = 0.0f;
        }
    };
    for (int64_t s = 0; s < n; s += PANEL) {
        const Item* items = z.seen.items.data() + s;
        const int64_t keys = std::min(PANEL, n - s);
        if (n > FEW && s % FLUSH == 0) put_by();
        gathered(p.k, b, g, items, keys, p.D, z.k);
        gathered(p.v, b, g, items, keys, p.V, z.v);
        bool partly = false;
        for (int64_t k = 0; k < keys; k++) {
            z.bias[k] = bias_of(p, b, h, items[k].key);
            partly |= items[k].lo > 0 || items[k].hi < count;
        }
        product(keys, wide, p.D, z.k, p.D, 1, z.q, NR, NR * p.D, z.x, ROWS, false);
        for (int64_t c = 0; c < wide; c += W) {
            float* x = z.x + c;
            vf was = load(z.top + c), best = was;
            if (partly || p.bias)
                for (int64_t k = 0; k < keys; k++) {
                    vf y = shown(load(x + k * ROWS), items[k], c, z.bias[k], partly);
                    store(x + k * ROWS, y);
                    best = max(y, best);
                }
            else
                for (int64_t k = 0; k < keys; k++) best = max(load(x + k * ROWS), best);
            vf base = best == -INF ? vf{} : best, keep = exp(was - base), mass = load(z.total + c) * keep;
            for (int64_t k = 0; k < keys; k++) {
                vf y = exp(load(x + k * ROWS) - base);
                store(x + k * ROWS, y);
                mass += y;
            }
            store(z.top + c, best), store(z.total + c, mass), store(z.keep + c, keep);
        }
        for (int64_t r = 0; r < count && s > 0; r++) {
            float by = z.keep[r];
            if (by == 1.0f) continue;
            for (int64_t d = 0; d < p.V; d += W) store(z.o + r * p.V + d, load(z.o + r * p.V + d) * by);
            for (int64_t d = 0; d < (n > FEW ? ld : 0); d++) z.far[r * ld + d] *= by;
        }
        product(count, p.V, keys, z.x, 1, ROWS, z.v, p.V, NR, z.o, p.V, true);
    }
    if (n > FEW) {
        put_by();
        for (int64_t r = 0; r < count; r++) {
            for (int64_t d = 0; d < p.V; d++) z.o[r * p.V + d] = float(z.far[r * ld + d]);
            z.total[r] = float(z.far[r * ld + p.V]);
        }
    }
    for (int64_t r = 0; r < count; r++) {
        float total = z.total[r], by = total != 0 ? 1.0f / total : 0.0f, *out = p.out.at(b, h, t + r);
        for (int64_t d = 0; d < p.V; d += W) store(out + d, load(z.o + r * p.V + d) * by);
        p.lse[(b * p.H + h) * p.T + t + r] = total != 0 ? z.top[r] + std::log(total) : -INF;
    }
}

inline void ask(const View& from, int64_t b, int64_t g, int32_t key, int64_t width) {
    const char* at = (const char*)from.at(b, g, key);
    for (int64_t i = 0; i < width * 4; i += 64) __builtin_prefetch(at + i);
}

// x[k] = q . row of key k, filled up to whole vectors.
void dots(const View& from, int64_t b, int64_t g, const Item* items, int64_t n, const float* q, int64_t D, float* x) {
    for (int64_t k = 0; k < n; k += W) {
        const float* row[W];
        for (int j = 0; j < W; j++) row[j] = from.at(b, g, items[std::min(k + j, n - 1)].key);
        for (int j = 0; j < W; j++)
            if (k + W + j < n) ask(from, b, g, items[k + W + j].key, D);
        vf acc[W] = {};
        for (int64_t d = 0; d < D; d += W) {
            vf y = load(q + d);
#pragma GCC unroll 16
            for (int j = 0; j < W; j++) acc[j] += load(row[j] + d) * y;
        }
        store(x + k, sums(acc));
    }
}

// o += sum over k of x[k] row of key k
template <int C>
inline void mixed(const View& from, int64_t b, int64_t g, const Item* items, int64_t n, const float* x, int64_t d, float* o) {
    vf acc[C];
    for (int c = 0; c < C; c++) acc[c] = load(o + d + c * W);
    for (int64_t k = 0; k < n; k++) {
        if (k + 8 < n) ask(from, b, g, items[k + 8].key, C * W);
        const float* row = from.at(b, g, items[k].key) + d;
        vf w = splat(x[k]);
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) acc[c] += w * load(row + c * W);
    }
    for (int c = 0; c < C; c++) store(o + d + c * W, acc[c]);
}

void mixed(const View& from, int64_t b, int64_t g, const Item* items, int64_t n, const float* x, int64_t width, float* o) {
    int64_t d = 0;
    for (; d + 8 * W <= width; d += 8 * W) mixed<8>(from, b, g, items, n, x, d, o);
    for (; d + 4 * W <= width; d += 4 * W) mixed<4>(from, b, g, items, n, x, d, o);
    for (; d < width; d += W) mixed<1>(from, b, g, items, n, x, d, o);
}

void alone(const Listed& p, int64_t b, int64_t h, int64_t t, Room& z, std::vector<float>& x) {
    const int64_t g = h / (p.H / p.G), n = z.seen.items.size(), wide = cut(n, W) * W;
    const Item* items = z.seen.items.data();
    float *out = p.out.at(b, h, t), *lse = p.lse + (b * p.H + h) * p.T + t;
    std::fill(out, out + p.V, 0.0f);
    *lse = -INF;
    if (n == 0) return;
    if (int64_t(x.size()) < wide) x.resize(wide);
    dots(p.k, b, g, items, n, p.q.at(b, h, t), p.D, x.data());
    for (int64_t k = n; k < wide; k++) x[k] = -INF;
    vf best = splat(-INF), scale = splat(float(p.scale));
    for (int64_t k = 0; k < wide; k += W) {
        vf y = load(&x[k]) * scale;
        if (p.bias) {
            for (int64_t j = k; j < std::min(n, k + W); j++) z.bias[j - k] = bias_of(p, b, h, items[j].key);
            y += load(z.bias);
        }
        if (k + W > n) y = lanes() + float(k) < float(n) ? y : splat(-INF);
        store(&x[k], y);
        best = max(y, best);
    }
    const float top = most(best), base = top == -INF ? 0.0f : top;
    double total = 0;
    std::vector<double> far(n > FEW ? p.V : 0);
    for (int64_t s = 0; s < n; s += FLUSH) {
        vf mass = {};
        for (int64_t k = s; k < std::min(wide, s + FLUSH); k += W) {
            vf y = exp(load(&x[k]) - base);
            store(&x[k], y);
            mass += y;
        }
        total += sum(mass);
        mixed(p.v, b, g, items + s, std::min(FLUSH, n - s), &x[s], p.V, out);
        for (int64_t d = 0; d < int64_t(far.size()); d++) far[d] += out[d], out[d] = 0.0f;
    }
    if (total == 0) {
        std::fill(out, out + p.V, 0.0f);
        return;
    }
    for (int64_t d = 0; d < int64_t(far.size()); d++) out[d] = float(far[d]);
    const float by = float(1 / total);
    for (int64_t d = 0; d < p.V; d += W) store(out + d, load(out + d) * by);
    *lse = float(top + std::log(total));
}

inline float delta_of(const Listed& p, int64_t b, int64_t h, int64_t t) {
    const float *x = p.grad.at(b, h, t), *y = p.out.at(b, h, t);
    vf s = {};
    for (int64_t d = 0; d < p.V; d += W) s += load(x + d) * load(y + d);
    return sum(s);
}

inline void added(float* to, const float* from, float by, int64_t width) {
    for (int64_t d = 0; d < width; d += W) store(to + d, load(to + d) + load(from + d) * by);
}

void together_backward(const Listed& p, int64_t part, int64_t b, int64_t h, int64_t t, int64_t count, Room& z) {
    const int64_t g = h / (p.H / p.G), wide = cut(count, NR) * NR, n = z.seen.items.size();
    const float* lse = p.lse + (b * p.H + h) * p.T + t;
    turned(p.q, b, h, t, count, wide, p.D, float(p.scale), z.q);
    turned(p.grad, b, h, t, count, wide, p.V, 1.0f, z.grad);
    float *q = z.rows, *grad = z.rows + ROWS * p.D, *dk = room(PANEL * p.D), *dv = room(PANEL * p.V);
    std::fill(z.top, z.top + wide, 0.0f);
    std::fill(z.total, z.total + wide, 0.0f);
    for (int64_t r = 0; r < count; r++) {
        memcpy(q + r * p.D, p.q.at(b, h, t + r), p.D * sizeof(float));
        memcpy(grad + r * p.V, p.grad.at(b, h, t + r), p.V * sizeof(float));
        z.top[r] = lse[r] == -INF ? 0.0f : lse[r], z.total[r] = delta_of(p, b, h, t + r);
    }
    for (int64_t s = 0; s < n; s += PANEL) {
        const Item* items = z.seen.items.data() + s;
        const int64_t keys = std::min(PANEL, n - s);
        gathered(p.k, b, g, items, keys, p.D, z.k);
        gathered(p.v, b, g, items, keys, p.V, z.v);
        product(keys, wide, p.D, z.k, p.D, 1, z.q, NR, NR * p.D, z.x, ROWS, false);
        product(keys, wide, p.V, z.v, p.V, 1, z.grad, NR, NR * p.V, z.ds, ROWS, false);
        for (int64_t k = 0; k < keys; k++) {
            const float bias = bias_of(p, b, h, items[k].key);
            vf all = {};
            for (int64_t c = 0; c < wide; c += W) {
                vf score = shown(load(z.x + k * ROWS + c), items[k], c, bias, true), y = exp(score - load(z.top + c));
                // Where one key has all the weight, the two sums are equal but for their rounding.
                vf d = y == 1.0f ? vf{} : y * (load(z.ds + k * ROWS + c) - load(z.total + c));
                store(z.x + k * ROWS + c, y), store(z.ds + k * ROWS + c, d * float(p.scale));
                all += d;
            }
            if (p.dbias) p.dbias[((part * p.B + b) * p.H + h) * p.S + items[k].key] += sum(all);
        }
        product(keys, p.D, count, z.ds, ROWS, 1, q, p.D, NR, dk, p.D, false);
        product(keys, p.V, count, z.x, ROWS, 1, grad, p.V, NR, dv, p.V, false);
        for (int64_t k = 0; k < keys; k++) {
            added(p.dk.at(part * p.B + b, h, items[k].key), dk + k * p.D, 1.0f, p.D);
            added(p.dv.at(part * p.B + b, h, items[k].key), dv + k * p.V, 1.0f, p.V);
        }
        product(count, p.D, keys, z.ds, 1, ROWS, z.k, p.D, NR, p.dq.at(b, h, t), p.dq.t, true);
    }
    done(dk), done(dv);
}

void alone_backward(const Listed& p, int64_t part, int64_t b, int64_t h, int64_t t, Room& z, std::vector<float>& x) {
    const int64_t g = h / (p.H / p.G), n = z.seen.items.size(), wide = cut(n, W) * W;
    if (n == 0) return;
    const Item* items = z.seen.items.data();
    const float lse = p.lse[(b * p.H + h) * p.T + t], base = lse == -INF ? 0.0f : lse, delta = delta_of(p, b, h, t);
    if (int64_t(x.size()) < 2 * wide) x.resize(2 * wide);
    float *y = x.data(), *ds = y + wide;
    const float *q = p.q.at(b, h, t), *grad = p.grad.at(b, h, t);
    dots(p.k, b, g, items, n, q, p.D, y);
    dots(p.v, b, g, items, n, grad, p.V, ds);
    for (int64_t k = 0; k < n; k++) y[k] = y[k] * float(p.scale) + bias_of(p, b, h, items[k].key);
    for (int64_t k = n; k < wide; k++) y[k] = -INF;
    for (int64_t k = 0; k < wide; k += W) {
        vf w = exp(load(y + k) - base), d = w == 1.0f ? vf{} : w * (load(ds + k) - delta);
        store(y + k, w), store(ds + k, d);
    }
    for (int64_t k = 0; k < n; k++) {
        if (p.dbias) p.dbias[((part * p.B + b) * p.H + h) * p.S + items[k].key] += ds[k];
        ds[k] *= float(p.scale);
        added(p.dk.at(part * p.B + b, h, items[k].key), q, ds[k], p.D);
        added(p.dv.at(part * p.B + b, h, items[k].key), grad, y[k], p.V);
    }
    mixed(p.k, b, g, items, n, ds, p.D, p.dq.at(b, h, t));
}

// do(b, h, t, count) for all pieces of runs of a head that are `part` modulo `parts`; the last first, which see most.
template <class Do>
void pieces(const Listed& p, int64_t size, int64_t part, int64_t parts, Do each) {
    int64_t cuts = cut(p.run, size), n = cut(p.T, p.run) * cuts;
    for (int64_t c = n - 1 - part; c >= 0; c -= parts) {
        int64_t t = c / cuts * p.run + c % cuts * size, end = std::min({p.T, t + size, (c / cuts + 1) * p.run});
        if (t < end) each(t, end - t);
    }
}
}  // namespace

extern "C" void regard_listed(const Listed* given) {
    const Listed& p = *given;
    // Keys of one head at a time: those of all would not stay in the nearer caches.
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(cut(p.T, ALONE), 8 * p.threads));
#pragma omp parallel num_threads(p.threads)
    {
        Room z(p);
        std::vector<float> x;
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < p.B * p.H * parts; n++) {
            int64_t b = n / parts / p.H, h = n / parts % p.H, part = n % parts;
            pieces(p, p.run < ALONE ? p.run : ROWS, part, parts, [&](int64_t t, int64_t count) {
                if (p.run >= ALONE) {
                    z.seen.of(p, b, h, t, count);
                    together(p, b, h, t, count, z);
                } else
                    for (int64_t r = t; r < t + count; r++) z.seen.of(p, b, h, r, 1), alone(p, b, h, r, z, x);
            });
        }
    }
}

extern "C" void regard_listed_backward(const Listed* given) {
    const Listed& p = *given;
#pragma omp parallel num_threads(p.threads)
    {
        Room z(p);
        std::vector<float> x;
        // Each part of a head's queries sums gradients of keys of its own.
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < p.B * p.H * p.parts; n++) {
            int64_t b = n / p.parts / p.H, h = n / p.parts % p.H, part = n % p.parts;
            pieces(p, p.run < ALONE ? p.run : ROWS, part, p.parts, [&](int64_t t, int64_t count) {
                if (p.run >= ALONE) {
                    z.seen.of(p, b, h, t, count);
                    together_backward(p, part, b, h, t, count, z);
                } else
                    for (int64_t r = t; r < t + count; r++)
                        z.seen.of(p, b, h, r, 1), alone_backward(p, part, b, h, r, z, x);
            });
        }
    }
}

// Of tokens that come one by one and of which the `most` greatest stay, of equals the latest: until[s] is the token
// with which s goes, n if it stays. Hidden tokens go at once. NaN is greater than all.
extern "C" void regard_lasting(const double* x, const uint8_t* real, int32_t* until, int64_t rows, int64_t n, int64_t most,
                               int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t r = 0; r < rows; r++) {
        typedef std::pair<double, int32_t> Held;
        std::vector<Held> heap;
        heap.reserve(most + 1 < n ? most + 1 : n);
        std::greater<Held> last;
        for (int64_t s = 0; s < n; s++) {
            until[r * n + s] = real[r * n + s] ? int32_t(n) : 0;
            if (!real[r * n + s]) continue;
            double y = x[r * n + s];
            heap.push_back({y == y ? y : double(INF), int32_t(s)});
            std::push_heap(heap.begin(), heap.end(), last);
            if (int64_t(heap.size()) <= most) continue;
            std::pop_heap(heap.begin(), heap.end(), last);
            until[r * n + heap.back().second] = int32_t(s);
            heap.pop_back();
        }
    }
}

// out[n][c * block + i] = the greatest of q[n][r] . keys[index[n][c] * block + i] over r, for n of N; all in a row.
extern "C" void regard_greatest(const float* q, const float* keys, const int64_t* index, float* out, int64_t N, int64_t r,
                                int64_t c, int64_t block, int64_t D, int threads) {
    const int64_t wide = cut(r, NR) * NR;
#pragma omp parallel num_threads(threads)
    {
        float *turned = room(wide * D), *held = room(PANEL * D), *x = room(PANEL * wide);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            for (int64_t t = 0; t < wide; t++) {
                const float* row = q + (n * r + std::min(t, r - 1)) * D;  // the last again is no greater
                for (int64_t d = 0; d < D; d++) turned[t / NR * NR * D + d * NR + t % NR] = row[d];
            }
            for (int64_t s = 0; s < c * block; s += PANEL) {
                const int64_t some = std::min(PANEL, c * block - s);
                for (int64_t k = 0; k < some; k++) {
                    int64_t at = index[n * c + (s + k) / block] * block + (s + k) % block;
                    memcpy(held + k * D, keys + at * D, D * sizeof(float));
                }
                product(some, wide, D, held, D, 1, turned, NR, NR * D, x, wide, false);
                for (int64_t k = 0; k < some; k++) {
                    vf best = load(x + k * wide);
                    for (int64_t t = W; t < wide; t += W) best = max(best, load(x + k * wide + t));
                    out[n * c * block + s + k] = most(best);
                }
            }
        }
        done(turned), done(held), done(x);
    }
}
