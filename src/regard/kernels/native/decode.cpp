// Softmax attention of one query a head, or a few, over a long cache, in fp32, or in bf16 with sums in fp32.
//
// Keys and values are fetched once, as they lie, for all queries that read them: the rows of a key head are the T queries
// of each of its H / G heads. The keys are cut into splits; each is a task, so that few heads keep many threads busy too.
// A split's scores are all formed before its values are read; what the splits give is put together by their greatest
// scores and totals, in doubles. How the keys are cut depends on
// their number alone: the result is the same in any batch and with any number of threads.
#include <atomic>

#include "attention.h"

extern "C" struct Decode {
    int64_t B, H, G, T, S, D, V, threads, half, causal;  // D and V are multiples of W; half: bf16
    View q, k, v, out;
    const float* bias;  // added to scores: bias[b * bias_b + h * bias_h + t * bias_t + s], if not null
    int64_t bias_b, bias_h, bias_t;
    const uint8_t* mask;  // 0 where a key is hidden, likewise
    int64_t mask_b, mask_h, mask_t;
    const void *new_k, *new_v;  // not null: (B, G, D) and (B, G, V) in a row, to be written where the last key lies
    float* lse;                 // not null: (B, H, T), the log-sum-exp of each query's scores
    const float *cos, *sin;     // not null: queries and the new keys are turned by them; fp32, D even, one query
    double scale;
};

namespace {
constexpr int64_t SPLIT = 512;           // keys of a task; sums over so many are exact enough in floats
constexpr int64_t PIECE = 32;            // keys that stay in the first-level cache while all rows pass over them
constexpr int64_t WORTH = 96 * 1024;     // bytes of keys and values for which waking another thread pays

struct Two { vf a, b; };  // 2 W numbers, or W and as many zeros: then `part` and `put` touch no more than W

struct Full {
    typedef float Number;
    static Two at(const Number* p) { return {load(p), load(p + W)}; }
    static Two part(const Number* p) { return {load(p), vf{}}; }
    static void put(Number* p, Two x, int64_t n) {
        store(p, x.a);
        if (n > W) store(p + W, x.b);
    }
};

struct Half {  // the even ones and the odd ones: of each pair, the low and the high half of 32 bits
    typedef uint16_t Number;
    static Two at(const Number* p) {
        vi x;
        memcpy(&x, p, sizeof x);
        return {(vf)(x << 16), (vf)(x & -65536)};
    }
    static Two part(const Number* p) {
        vi x = {};
        memcpy(&x, p, sizeof x / 2);
        return {(vf)(x << 16), (vf)(x & -65536)};
    }
    static uint16_t narrow(float x) {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // what is NaN is reported, and computed elsewhere
    }
    static void put(Number* p, Two x, int64_t n) {
        for (int i = 0; i < std::min<int64_t>(n, 2 * W) / 2; i++) p[2 * i] = narrow(x.a[i]), p[2 * i + 1] = narrow(x.b[i]);
    }
};

inline void fetch(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i);
}

// Room for so many numbers in whole Twos.
inline int64_t room(int64_t n) { return cut(n, 2 * W) * 2 * W; }

// x[m][j] = q[m] . row[j] for M rows of queries and W / M keys.
template <class N, int M>
inline void dots(const float* q, int64_t D, const typename N::Number* const* row, float* x) {
    constexpr int K = W / M;
    vf acc[W] = {};
    int64_t ld = room(D), whole = D / (2 * W) * 2 * W;
    for (int64_t d = 0; d < whole; d += 2 * W)
#pragma GCC unroll 16
        for (int j = 0; j < K; j++) {
            Two y = N::at(row[j] + d);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                acc[m * K + j] += y.a * load(q + m * ld + d);
                acc[m * K + j] += y.b * load(q + m * ld + d + W);
            }
        }
    if (whole < D)
#pragma GCC unroll 16
        for (int j = 0; j < K; j++) {
            Two y = N::part(row[j] + whole);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                acc[m * K + j] += y.a * load(q + m * ld + whole);
                acc[m * K + j] += y.b * load(q + m * ld + whole + W);
            }
        }
    vf all = sums(acc);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) memcpy(x + m * SPLIT, (const char*)&all + m * K * sizeof(float), K * sizeof(float));
}

// o[m][0 .. 2 W P) += sum over n keys of x[m][j] v[j]
template <class N, int M, int P, bool PART = false>
inline void weighted(int64_t n, const float* x, const typename N::Number* v, int64_t ld, float* o, int64_t V) {
    vf acc[M][2 * P];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int c = 0; c < 2 * P; c++) acc[m][c] = load(o + m * V + c * W);
    for (int64_t j = 0; j < n; j++)
#pragma GCC unroll 4
        for (int c = 0; c < P; c++) {
            Two y = PART ? N::part(v + j * ld) : N::at(v + j * ld + c * 2 * W);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                vf w = splat(x[m * SPLIT + j]);
                acc[m][2 * c] += w * y.a;
                acc[m][2 * c + 1] += w * y.b;
            }
        }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int c = 0; c < 2 * P; c++) store(o + m * V + c * W, acc[m][c]);
}

template <class N, int M>
inline void columns(int64_t n, const float* x, const typename N::Number* v, int64_t ld, float* o, int64_t V) {
    constexpr int P = 4 / M;  // 8 accumulators
    int64_t c = 0, wide = room(V);
    for (; c + 2 * W * P <= V; c += 2 * W * P) weighted<N, M, P>(n, x, v + c, ld, o + c, wide);
    for (; c + 2 * W <= V; c += 2 * W) weighted<N, M, 1>(n, x, v + c, ld, o + c, wide);
    if (c < V) weighted<N, M, 1, true>(n, x, v + c, ld, o + c, wide);
}

struct Part { float top, total; };  // greatest score, and the sum of e^(score - top)

// The queries of one key head against the keys first .. first + n. `wide` rows, filled up with zeros, in strips of M.
template <class N, int M>
bool split(const Decode& p, int64_t b, int64_t g, int64_t first, int64_t n, int64_t wide, float* q, float* x, float* o,
           Part* parts) {
    typedef typename N::Number Number;
    constexpr int K = W / M;
    int64_t rows = p.H / p.G * p.T, head = g * (p.H / p.G), D = room(p.D), V = room(p.V);
    bool odd = false;
    const Number *k = p.k.at<Number>(b, g, first), *v = p.v.at<Number>(b, g, first);
    std::fill(o, o + wide * V, 0.0f);
    for (int64_t r = 0; r < wide; r++)
        for (int64_t d = 0; d < D; d += 2 * W) {
            const Number* from = p.q.at<Number>(b, head + r / p.T, r % p.T) + d;
            Two y = r >= rows ? Two{} : d + 2 * W > p.D ? N::part(from) : N::at(from);
            store(q + r * D + d, y.a * float(p.scale)), store(q + r * D + d + W, y.b * float(p.scale));
        }
    for (int64_t s = 0; s < n; s += PIECE) {
        for (int64_t j = s + PIECE; j < std::min(n, s + 2 * PIECE); j++) fetch(k + j * p.k.t, p.D * sizeof(Number));
        for (int64_t m = 0; m < wide; m += M)
            for (int64_t j = s; j < std::min(n, s + PIECE); j += K) {
                const Number* row[K];
                for (int i = 0; i < K; i++) row[i] = k + std::min(j + i, n - 1) * p.k.t;
                dots<N, M>(q + m * D, p.D, row, x + m * SPLIT + j);
            }
    }
    int64_t filled = cut(n, W) * W;
    for (int64_t r = 0; r < rows; r++) {
        float* y = x + r * SPLIT;
        std::fill(y + n, y + filled, 0.0f);
        odd |= !finite(y, filled);
        int64_t h = head + r / p.T, t = r % p.T;
        if (p.bias) {
            const float* bias = p.bias + b * p.bias_b + h * p.bias_h + t * p.bias_t + first;
            for (int64_t j = 0; j < n; j++) y[j] += bias[j];
        }
        if (p.mask) {
            const uint8_t* mask = p.mask + b * p.mask_b + h * p.mask_h + t * p.mask_t + first;
            for (int64_t j = 0; j < n; j++) y[j] = mask[j] ? y[j] : -INF;
        }
        int64_t seen = p.causal ? std::clamp<int64_t>(p.S - p.T + t + 1 - first, 0, n) : n;
        std::fill(y + seen, y + filled, -INF);
        vf best = splat(-INF), mass = {};
        for (int64_t j = 0; j < filled; j += W) best = max(load(y + j), best);
        float top = most(best), base = top == -INF ? 0.0f : top;  // NaN from a bias is no greatest, and stays
        for (int64_t j = 0; j < filled; j += W) {
            vf e = exp(load(y + j) - base);
            store(y + j, e);
            mass += e;
        }
        parts[r] = {top, sum(mass)};
    }
    for (int64_t s = 0; s < n; s += PIECE) {
        for (int64_t j = s + PIECE; j < std::min(n, s + 2 * PIECE); j++) fetch(v + j * p.v.t, p.V * sizeof(Number));
        for (int64_t m = 0; m < wide; m += M)
            columns<N, M>(std::min(PIECE, n - s), x + m * SPLIT + s, v + s * p.v.t, p.v.t, o + m * V, p.V);
    }
    return odd;
}

template <class N, int M>
bool decode(const Decode& p) {
    typedef typename N::Number Number;
    int64_t rows = p.H / p.G * p.T, wide = cut(rows, M) * M, D = room(p.D), V = room(p.V);
    int64_t splits = std::max<int64_t>(1, cut(p.S, SPLIT)), tasks = p.B * p.G * splits;  // without keys, too, there is an answer
    int64_t threads = std::min(p.threads, tasks);
    if (p.B * p.G * p.S * (p.D + p.V) * int64_t(sizeof(Number)) < WORTH) threads = 1;
    auto made = [](int64_t n) { return new (std::align_val_t(64)) float[n]; };
    auto done = [](float* x) { operator delete[](x, std::align_val_t(64)); };
    float* o = made(tasks * wide * V);
    std::vector<Part> parts(tasks * wide);
    std::vector<std::atomic<int64_t>> left(p.B * p.G);  // splits that are still to end
    for (auto& count : left) count = splits;
    int bad = 0;
#pragma omp parallel num_threads(threads) reduction(| : bad) if (threads > 1)
    {
        float *q = made(wide * (D + SPLIT)), *x = q + wide * D;
        std::vector<double> sum(V);
        std::vector<float> line(V);
        for (int64_t i = D * rows; i < D * wide; i++) q[i] = 0.0f;
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < tasks; i++) {
            int64_t bg = i / splits, first = i % splits * SPLIT;
            bad |= split<N, M>(p, bg / p.G, bg % p.G, first, std::min(SPLIT, p.S - first), wide, q, x,
                               o + i * wide * V, parts.data() + i * wide);
            // Whoever ends a key head's last split puts them together: threads meet once, at the end.
            if (left[bg].fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
            for (int64_t r = 0; r < rows; r++) {
                int64_t at = bg * splits * wide + r;
                Number* out = p.out.at<Number>(bg / p.G, bg % p.G * (p.H / p.G) + r / p.T, r % p.T);
                float top = -INF;
                for (int64_t s = 0; s < splits; s++) top = std::max(top, parts[at + s * wide].top);
                double total = 0;
                std::fill(sum.begin(), sum.end(), 0.0);
                for (int64_t s = 0; s < splits; s++) {
                    Part part = parts[at + s * wide];
                    if (part.total == 0) continue;
                    double by = part.top == top ? 1.0 : std::exp(double(part.top) - top);
                    total += by * part.total;
                    const float* from = o + (at + s * wide) * V;
                    for (int64_t d = 0; d < V; d++) sum[d] += by * from[d];
                }
                if (p.lse) p.lse[(bg * (p.H / p.G) + r / p.T) * p.T + r % p.T] = total == 0 ? -INF : float(top + std::log(total));
                double by = total == 0 ? 0.0 : 1 / total;
                for (int64_t d = 0; d < V; d++) line[d] = float(sum[d] * by);
                bad |= !finite(line.data(), V);
                for (int64_t d = 0; d < p.V; d += 2 * W) N::put(out + d, {load(&line[d]), load(&line[d] + W)}, p.V - d);
            }
        }
        done(q);
    }
    done(o);
    return bad;
}

// z cos + (z, its halves exchanged) sin.
void turned(const Decode& p, const float* from, float* to) {
    for (int64_t d = 0, half = p.D / 2; d < half; d++) {
        float x = from[d], y = from[d + half];
        to[d] = x * p.cos[d] + y * p.sin[d];
        to[d + half] = y * p.cos[d + half] + x * p.sin[d + half];
    }
}

// The new token's key and value join those that are held, and queries that are turned go to `room`.
template <class N>
void join(Decode& p, std::vector<float>& room) {
    typedef typename N::Number Number;
    if (p.cos) room.resize(p.B * p.H * p.D);
    for (int64_t b = 0; b < p.B; b++) {
        for (int64_t h = 0; p.cos && h < p.H; h++) turned(p, p.q.at<float>(b, h, 0), &room[(b * p.H + h) * p.D]);
        for (int64_t g = 0; g < p.G; g++) {
            const Number *k = (const Number*)p.new_k + (b * p.G + g) * p.D, *v = (const Number*)p.new_v + (b * p.G + g) * p.V;
            if (p.cos) turned(p, (const float*)k, p.k.at<float>(b, g, p.S - 1));
            else memcpy(p.k.at<Number>(b, g, p.S - 1), k, p.D * sizeof(Number));
            memcpy(p.v.at<Number>(b, g, p.S - 1), v, p.V * sizeof(Number));
        }
    }
    if (p.cos) p.q = {room.data(), p.H * p.D, p.D, p.D};
}

template <class N>
bool decode(Decode p) {
    std::vector<float> room;
    if (p.new_k) join<N>(p, room);
    int64_t rows = p.H / p.G * p.T;
    return rows == 1 ? decode<N, 1>(p) : rows == 2 ? decode<N, 2>(p) : decode<N, 4>(p);
}
}  // namespace

// Whether a query, a key or an output was NaN or infinite: then the result is not to be used.
extern "C" int regard_decode(const Decode* p) { return p->half ? decode<Half>(*p) : decode<Full>(*p); }
