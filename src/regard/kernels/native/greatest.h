// The greatest numbers of a row, by passes of whole vectors.
#pragma once
#include <algorithm>
#include <limits>

#include "simd.h"

namespace {
constexpr float INF = std::numeric_limits<float>::infinity();

// The k-th greatest of n numbers of which `high` is the greatest, by halving: each pass moves a bound to a number that is
// there. Where there are fewer, something that none is below; -inf doesn't count as one. n is a multiple of W.
float kth(const float* x, int64_t n, int64_t k, float high) {
    float low = std::numeric_limits<float>::lowest(), mid = low;
    while (low < high) {
        vf count = {}, above = splat(INF), below = splat(-INF);
        for (int64_t j = 0; j < n; j += W) {
            vf y = load(x + j);
            count += y >= mid ? splat(1.0f) : vf{};
            above = y >= mid && y < above ? y : above;
            below = y < mid && y > below ? y : below;
        }
        if (sum(count) < k)
            high = most(below);
        else
            low = -most(-above);
        if (sum(count) == k) break;
        mid = low / 2 + high / 2;
        if (!(mid > low)) mid = high;
    }
    return low;
}

int64_t groups(int64_t n, int64_t k) { return (std::min(n, 4 * k) + W - 1) / W * W; }
}  // namespace
