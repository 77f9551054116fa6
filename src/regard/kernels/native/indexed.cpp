// The keys that small heads score highest for each query: I_ts = sum over h of w_th relu(q_th . k_s), and its k greatest.
//
// A few queries' scores stay in the second-level cache from the products to the choice; nothing of size T x S is formed.
#include <vector>

#include "greatest.h"

extern "C" struct Indexed {
    int64_t B, H, T, S, D, k, causal, threads;
    const float *q, *w, *keys;  // (B, H, T, D), (B, H, T) and (B, S, D) in a row
    const uint8_t* keep;        // (Bk, S) or null: 0 where a key is hidden
    int64_t Bk;
    float* turned;              // scratch: B S' D, where S' is S in whole panels
    int32_t* out;               // (B, T, k), -1 where there are fewer
};

namespace {
constexpr int64_t ROWS = MR, WIDE = 8 * NR;  // queries and keys scored together

inline int64_t cut(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline float* room(int64_t n) { return new (std::align_val_t(64)) float[n]; }
inline void done(float* x) { operator delete[](x, std::align_val_t(64)); }

// Places of the k greatest of n, of equals the last; -inf is none. The row is dealt out to groups: the k-th greatest of
// their maxima is at most that of the row, and few reach it. Whether a number was NaN. scratch holds 2 n + groups + 3 W.
bool pick(const float* z, int64_t n, int64_t k, float* scratch, int32_t* out) {
    const int64_t G = groups(n, k);
    float *tops = scratch, *found = tops + G;
    int32_t* at = (int32_t*)(found + n + 2 * W);
    std::fill(tops, tops + G, -INF);
    vi strange = {};
    vf best = splat(-INF);
    for (int64_t i = 0; i < n; i += G) {
        int64_t end = std::min(G, n - i), whole = end / W * W;
        for (int64_t g = 0; g < whole; g += W) {
            vf y = load(z + i + g);
            strange |= y != y;
            store(tops + g, max(y, load(tops + g)));
        }
        for (int64_t g = whole; g < end; g++) {
            strange[0] |= z[i + g] != z[i + g];
            tops[g] = std::max(tops[g], z[i + g]);
        }
    }
    for (int64_t g = 0; g < G; g += W) best = max(load(tops + g), best);
    if (sum(strange ? splat(1.0f) : vf{}) > 0) return true;
    const float top = most(best);
    int64_t count = 0, room = k;
    if (top > -INF) {
        float least = kth(tops, G, k, top);
        for (int64_t j = 0; j < n; j++) {  // written anyway, kept if the count moves on: no branch to guess
            found[count] = z[j], at[count] = int32_t(j);
            count += z[j] >= least;
        }
        std::fill(found + count, found + cut(count, W) * W, -INF);
        least = kth(found, cut(count, W) * W, k, top);
        for (int64_t i = 0; i < count; i++) room -= found[i] > least;
        for (int64_t i = count - 1; i >= 0; i--)
            if (found[i] > least)
                *out++ = at[i], k--;
            else if (found[i] == least && room > 0)
                *out++ = at[i], k--, room--;
    }
    std::fill(out, out + k, -1);
    return false;
}

void scores(const Indexed& p, int64_t b, int64_t t, int64_t rows, int64_t n, float* x, float* I, int64_t ld) {
    const int64_t wide = cut(p.S, NR) * NR;
    for (int64_t s = 0; s < n; s += WIDE) {
        const int64_t width = std::min(WIDE, cut(n - s, NR) * NR);
        for (int64_t h = 0; h < p.H; h++) {
            const float *q = p.q + ((b * p.H + h) * p.T + t) * p.D, *w = p.w + (b * p.H + h) * p.T + t;
            product(rows, width, p.D, q, p.D, 1, p.turned + (b * wide + s) * p.D, NR, NR * p.D, x, WIDE, false);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t j = 0; j < width; j += W) {
                    vf y = load(x + r * WIDE + j), old = h ? load(I + r * ld + s + j) : vf{};
                    y = y <= 0.0f ? vf{} : y;  // NaN stays
                    store(I + r * ld + s + j, old + y * w[r]);
                }
        }
    }
}
}  // namespace

// Whether a score was NaN: then the choice is not to be used.
extern "C" int regard_indexed(const Indexed* given) {
    const Indexed& p = *given;
    const int64_t panels = cut(p.S, NR), ld = panels * NR + WIDE;
    int bad = 0;
#pragma omp parallel num_threads(p.threads) reduction(| : bad)
    {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < p.B * panels; n++)
            for (int64_t j = 0; j < NR; j++) {
                int64_t s = n % panels * NR + j;
                const float* key = p.keys + (n / panels * p.S + std::min(s, p.S - 1)) * p.D;
                for (int64_t d = 0; d < p.D; d++) p.turned[(n * p.D + d) * NR + j] = s < p.S ? key[d] : 0.0f;
            }
        float *I = room(ROWS * ld), *x = room(ROWS * WIDE), *scratch = room(2 * ld + groups(ld, p.k) + 3 * W);
        const int64_t each = cut(p.T, ROWS);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < p.B * each; i++) {
            const int64_t b = i / each, t = (each - 1 - i % each) * ROWS, rows = std::min(ROWS, p.T - t);
            auto seen = [&](int64_t r) {
                return p.causal ? std::max<int64_t>(0, std::min(p.S, t + r + 1 + p.S - p.T)) : p.S;
            };
            scores(p, b, t, rows, seen(rows - 1), x, I, ld);
            for (int64_t r = 0; r < rows; r++) {
                float* row = I + r * ld;
                if (p.keep)
                    for (int64_t s = 0; s < seen(r); s++) row[s] = p.keep[b % p.Bk * p.S + s] ? row[s] : -INF;
                bad |= pick(row, seen(r), p.k, scratch, p.out + (b * p.T + t + r) * p.k);
            }
        }
        done(I), done(x), done(scratch);
    }
    return bad;
}
