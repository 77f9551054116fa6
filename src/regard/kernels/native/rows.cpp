// Normalisers of rows, forward and backward: each row stays in the first-level cache for all passes.
//
// alpha-entmax for alpha = 1.5 and 2 as in regard/normalizers/entmax.py: Newton steps on a convex form of sum p = 1, from
// below. Softmax over the k greatest as in regard/normalizers/topk.py. The backward of softmax is that of alpha = 1.
#include <algorithm>
#include <cmath>
#include <limits>

#include "greatest.h"

namespace {
constexpr float EPS = 1.1920929e-7f;
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr int STEPS = 24;
enum { SOFTMAX = 2, HALFWAY = 3, SPARSEMAX = 4 };  // 2 alpha

struct Sums { float h, slope; };

constexpr int64_t PIECE = 256 * W;  // numbers whose sum a float holds well: sums of pieces are summed in double

// sum(j) for j = 0, W, .. n - W.
template <class Term>
inline float total_of(int64_t n, Term term) {
    double total = 0;
    for (int64_t start = 0; start < n; start += PIECE) {
        vf part = {};
        for (int64_t j = start, end = std::min(n, start + PIECE); j < end; j += W) part += term(j);
        total += sum(part);
    }
    return float(total);
}

// What a Newton step asks for at tau. The row is filled up with -inf to whole vectors.
template <bool SQUARE>
inline Sums at(const float* x, int64_t n, float tau) {
    double total = 0, other = 0;
    for (int64_t start = 0; start < n; start += PIECE) {
        vf a = {}, b = {};
        for (int64_t j = start, end = std::min(n, start + PIECE); j < end; j += W) {
            vf rest = max(load(x + j) - tau, vf{});
            a += rest;
            b += SQUARE ? rest * rest : (rest > 0.0f ? splat(1.0f) : vf{});
        }
        total += sum(a), other += sum(b);
    }
    if (!SQUARE) return {float(total), float(other)};
    double h = std::sqrt(other);
    return {float(h), h > 0 ? float(total / h) : 0};
}

template <bool SQUARE>
void solve(const float* z, float* p, int64_t n, float* x) {
    int64_t wide = (n + W - 1) / W * W;
    const float by = SQUARE ? 0.5f : 1.0f;  // alpha - 1
    std::fill(x + n, x + wide, -INF);
    vf best = splat(-INF);
    for (int64_t j = 0; j < n; j++) x[j] = z[j] * by;
    for (int64_t j = 0; j < wide; j += W) best = max(best, load(x + j));
    float top = most(best);
    if (top == -INF) {
        std::fill(p, p + n, 0.0f);
        return;
    }
    vf probe = {};
    for (int64_t j = 0; j < wide; j += W) {
        vf y = load(x + j) - top;
        store(x + j, y);
        probe = y == y ? probe : y;
    }
    if (probe = probe * 0.0f; !(sum(probe) == 0)) {  // NaN, or inf - inf: comparisons would drop it
        std::fill(p, p + n, NOT_A_NUMBER);
        return;
    }
    float tau = -1.0f;
    for (int i = 0; i < STEPS; i++) {
        Sums s = at<SQUARE>(x, wide, tau);
        float step = s.slope > 0 ? (s.h - 1.0f) / s.slope : 0.0f;
        if (!(step > EPS)) break;
        tau += step;
    }
    float part = 1.0f / total_of(wide, [=](int64_t j) {
        vf rest = max(load(x + j) - tau, vf{});
        if (SQUARE) rest *= rest;
        store(x + j, rest);
        return rest;
    });
    for (int64_t j = 0; j < n; j++) p[j] = x[j] * part;
}

// Softmax over the k greatest of a row and what equals the k-th. x holds 3 (n + groups) numbers.
//
// The row is dealt out like cards to G groups. The k-th greatest of the groups' maxima is at most the k-th greatest of the
// row, and few numbers reach it: the rest of the work is done on these, and on their groups.
void select(const float* z, float* p, int64_t n, int64_t k, float* x) {
    const int64_t G = groups(n, k), wide = (n + G - 1) / G * G;
    float *tops = x + wide, *found = tops + G;
    int32_t* at = (int32_t*)(found + n + W);
    std::copy(z, z + n, x);
    std::fill(x + n, x + wide, -INF);
    std::fill(tops, tops + G, -INF);
    vi strange = {};
    for (int64_t i = 0; i < wide; i += G)
        for (int64_t g = 0; g < G; g += W) {
            vf y = load(x + i + g);
            strange |= y != y;
            store(tops + g, max(y, load(tops + g)));
        }
    vf best = splat(-INF);
    for (int64_t g = 0; g < G; g += W) best = max(best, load(tops + g));
    const float top = most(best);
    if (top == INF || sum(strange ? splat(1.0f) : vf{}) > 0) {  // comparisons would drop NaN, and inf - inf is one
        std::fill(p, p + n, NOT_A_NUMBER);
        return;
    }
    std::fill(p, p + n, 0.0f);
    float least = kth(tops, G, k, top);
    int64_t count = 0;
    for (int64_t g = 0; g < G; g++)
        if (G == wide || tops[g] >= least)
            for (int64_t j = g; j < n; j += G) {  // written anyway, kept if the count moves on: no branch to guess
                found[count] = x[j], at[count] = int32_t(j);
                count += x[j] >= least;
            }
    int64_t filled = (count + W - 1) / W * W;
    std::fill(found + count, found + filled, -INF);
    least = kth(found, filled, k, top);
    const float part = 1.0f / total_of(filled, [=](int64_t i) {
        vf y = load(found + i);
        y = y >= least ? exp(y - top) : vf{};
        store(found + i, y);
        return y;
    });
    for (int64_t i = 0; i < count; i++) p[at[i]] = found[i] * part;
}

// dz = g (dp - sum(g dp) / sum(g)) with g = p^(2 - alpha) on the support.
template <int TWICE>
void pull_back(const float* p, const float* dp, float* dz, int64_t n, float* scratch) {
    const float* g = TWICE == SOFTMAX ? p : scratch;
    if (TWICE != SOFTMAX)
        for (int64_t j = 0; j < n; j++) scratch[j] = TWICE == HALFWAY ? std::sqrt(p[j]) : p[j] > 0;
    int64_t whole = n / W * W;
    float total = total_of(whole, [=](int64_t j) { return load(g + j); });
    float mixed = total_of(whole, [=](int64_t j) { return load(g + j) * load(dp + j); });
    for (int64_t j = whole; j < n; j++) total += g[j], mixed += g[j] * dp[j];
    float mean = total > 0 ? mixed / total : 0;
    for (int64_t j = 0; j < whole; j += W) store(dz + j, load(g + j) * (load(dp + j) - mean));
    for (int64_t j = whole; j < n; j++) dz[j] = g[j] * (dp[j] - mean);
}

// row(i, scratch) for every row.
template <class Row>
void each(int64_t rows, int64_t room, int threads, Row row) {
#pragma omp parallel num_threads(threads)
    {
        float* scratch = new (std::align_val_t(64)) float[room];
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) row(i, scratch);
        operator delete[](scratch, std::align_val_t(64));
    }
}
}  // namespace

// rows of n numbers each, one after another; twice: 2 alpha, 3 or 4.
extern "C" void regard_entmax(const float* z, float* p, int64_t rows, int64_t n, int twice, int threads) {
    each(rows, n + W, threads, [=](int64_t i, float* x) {
        (twice == HALFWAY ? solve<true> : solve<false>)(z + i * n, p + i * n, n, x);
    });
}

extern "C" void regard_topk(const float* z, float* p, int64_t rows, int64_t n, int64_t k, int threads) {
    each(rows, 3 * (n + groups(n, k)), threads, [=](int64_t i, float* x) { select(z + i * n, p + i * n, n, k, x); });
}

// twice: 2 alpha, where 2 is softmax.
extern "C" void regard_entmax_backward(const float* p, const float* dp, float* dz, int64_t rows, int64_t n, int twice,
                                       int threads) {
    auto row = twice == SOFTMAX ? pull_back<SOFTMAX> : twice == HALFWAY ? pull_back<HALFWAY> : pull_back<SPARSEMAX>;
    each(rows, n + W, threads, [=](int64_t i, float* g) { row(p + i * n, dp + i * n, dz + i * n, n, g); });
}
