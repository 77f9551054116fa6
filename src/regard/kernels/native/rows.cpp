// alpha-entmax of rows for alpha = 1.5 and 2, forward and backward: each row stays in the first-level cache for all passes.
//
// The method is that of regard/normalizers/entmax.py: Newton steps on a convex form of sum p = 1, from below.
#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"

namespace {
constexpr float INF = std::numeric_limits<float>::infinity(), EPS = 1.1920929e-7f;
constexpr int STEPS = 24;

struct Sums { float h, slope; };

// What a Newton step asks for at tau. The row is filled up with -inf to whole vectors.
template <bool SQUARE>
inline Sums at(const float* x, int64_t n, float tau) {
    vf a = {}, b = {};
    for (int64_t j = 0; j < n; j += W) {
        vf rest = max(load(x + j) - tau, vf{});
        a += rest;
        b += SQUARE ? rest * rest : (rest > 0.0f ? splat(1.0f) : vf{});
    }
    float total = sum(a), other = sum(b);
    if (!SQUARE) return {total, other};
    float h = std::sqrt(other);
    return {h, h > 0 ? total / h : 0};
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
        std::fill(p, p + n, std::numeric_limits<float>::quiet_NaN());
        return;
    }
    float tau = -1.0f;
    for (int i = 0; i < STEPS; i++) {
        Sums s = at<SQUARE>(x, wide, tau);
        float step = s.slope > 0 ? (s.h - 1.0f) / s.slope : 0.0f;
        if (!(step > EPS)) break;
        tau += step;
    }
    vf mass = {};
    for (int64_t j = 0; j < wide; j += W) {
        vf rest = max(load(x + j) - tau, vf{});
        if (SQUARE) rest *= rest;
        store(x + j, rest);
        mass += rest;
    }
    float part = 1.0f / sum(mass);
    for (int64_t j = 0; j < n; j++) p[j] = x[j] * part;
}

// dz = g (dp - sum(g dp) / sum(g)) with g = p^(2 - alpha) on the support.
template <bool SQUARE>
void pull_back(const float* p, const float* dp, float* dz, int64_t n, float* g) {
    float total = 0, mixed = 0;
    for (int64_t j = 0; j < n; j++) g[j] = SQUARE ? std::sqrt(p[j]) : (p[j] > 0 ? 1.0f : 0.0f);
    vf a = {}, b = {};
    int64_t whole = n / W * W;
    for (int64_t j = 0; j < whole; j += W) {
        a += load(g + j);
        b += load(g + j) * load(dp + j);
    }
    total = sum(a), mixed = sum(b);
    for (int64_t j = whole; j < n; j++) total += g[j], mixed += g[j] * dp[j];
    float mean = total > 0 ? mixed / total : 0;
    for (int64_t j = 0; j < n; j++) dz[j] = g[j] * (dp[j] - mean);
}
}  // namespace

// rows of n numbers each, one after another; square: alpha is 1.5, else 2.
extern "C" void regard_entmax(const float* z, float* p, int64_t rows, int64_t n, int square, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float* x = new (std::align_val_t(64)) float[n + W];
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) (square ? solve<true> : solve<false>)(z + i * n, p + i * n, n, x);
        operator delete[](x, std::align_val_t(64));
    }
}

extern "C" void regard_entmax_backward(const float* p, const float* dp, float* dz, int64_t rows, int64_t n, int square,
                                       int threads) {
#pragma omp parallel num_threads(threads)
    {
        float* g = new (std::align_val_t(64)) float[n + W];
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++)
            (square ? pull_back<true> : pull_back<false>)(p + i * n, dp + i * n, dz + i * n, n, g);
        operator delete[](g, std::align_val_t(64));
    }
}
