// Short vectors and a small matrix product, in the compiler's portable vector types: AVX-512, AVX2 and NEON from one text.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__x86_64__) && defined(__GLIBC__)
__asm__(".symver exp, exp@GLIBC_2.2.5");  // the same function under its old name: systems as old as torch asks for have it
#endif

#if defined(__AVX512F__)
constexpr int W = 16, MR = 12, NV = 2;  // 24 accumulators of 32 registers
#elif defined(__AVX__)
constexpr int W = 8, MR = 6, NV = 2;  // 12 of 16
#else
constexpr int W = 4, MR = 6, NV = 4;  // 24 of 32 on 64-bit ARM
#endif
constexpr int NR = NV * W;  // columns of one panel

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint8_t vb __attribute__((vector_size(W)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef float vfu __attribute__((vector_size(W * 4), aligned(4), may_alias));

static inline vf load(const float* p) { return *(const vfu*)p; }
static inline void store(float* p, vf x) { *(vfu*)p = x; }
// Numbers of 16 bits, as they lie in memory.
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
static inline vh halves(const void* p) {
    vh x;
    memcpy(&x, p, sizeof x);
    return x;
}
static inline vf load(const bf16* p) { return (vf)(__builtin_convertvector(halves(p), vi) << 16); }
static inline void store(bf16* p, vf x) {  // to nearest, ties to even; NaN stays one
    vi y = (vi)x;
    y = (x == x ? y + 0x7fff + ((y >> 16) & 1) : (y | 0x400000)) >> 16;
    vh z = __builtin_convertvector(y, vh);
    memcpy(p, &z, sizeof z);
}
#if defined(__AVX512F__)
#define FP16 1
static inline vf load(const fp16* p) { return (vf)_mm512_cvtph_ps((__m256i)halves(p)); }
static inline void store(fp16* p, vf x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, 0)); }
#elif defined(__F16C__)
#define FP16 1
static inline vf load(const fp16* p) { return (vf)_mm256_cvtph_ps((__m128i)halves(p)); }
static inline void store(fp16* p, vf x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 0)); }
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define FP16 1
static inline vf load(const fp16* p) { return (vf)vcvt_f32_f16((float16x4_t)halves(p)); }
static inline void store(fp16* p, vf x) {
    float16x4_t y = vcvt_f16_f32((float32x4_t)x);
    memcpy(p, &y, sizeof y);
}
#endif
static inline vf splat(float x) { return x - vf{}; }  // x + 0 would keep an addition, for the sake of -0
static inline vf max(vf a, vf b) { return a > b ? a : b; }
static inline vi allowed(const uint8_t* p) {
    vb m;
    memcpy(&m, p, W);
    return __builtin_convertvector(m, vi) != 0;
}
// Sum and greatest of the lanes, by halves.
#if defined(__AVX512F__)
static inline float sum(vf x) { return _mm512_reduce_add_ps((__m512)x); }
static inline float most(vf x) { return _mm512_reduce_max_ps((__m512)x); }
#else
static inline float sum(vf x) {
    float s = 0;
    for (int i = 0; i < W; i++) s += x[i];
    return s;
}
static inline float most(vf x) {
    float s = x[0];
    for (int i = 1; i < W; i++) s = x[i] > s ? x[i] : s;
    return s;
}
#endif

// e^x for x <= 0, and exactly 0 below -127 ln 2: with x = n ln 2 + r and |r| <= ln 2 / 2 it is 2^n times a polynomial in
// r (of least relative error, by weighted least squares): to about 1 ulp, or to 1e-4 where bf16 follows.
template <bool ROUGH = false>
static inline vf exp(vf x) {
    const vf magic = splat(12582912.0f + 127.0f);  // 1.5 * 2^23: adding it rounds; the low bits are then n + 127
    vf c = x < -88.0296919f ? splat(-88.0296919f) : x;  // NaN stays
    vf t = c * 1.44269504f + magic;
    vf power = (vf)((vi)t << 23);
    t -= magic;
#if defined(__AVX512DQ__)
    if constexpr (ROUGH) {  // the instruction that multiplies by 2^floor(t) takes any t: nothing is clamped
        __m512 t = (__m512)(x * 1.44269504f), r = _mm512_reduce_ps(t, 1);
        vf y = (vf)r * 0.07802452f + 0.22606724f;
        y = y * (vf)r + 0.69583347f;
        y = y * (vf)r + 0.99992523f;
        return (vf)_mm512_scalef_ps((__m512)y, t);
    }
#endif
    if constexpr (ROUGH) {
        vf r = c - t * 0.69314718f;
        vf y = r * 0.16662797f + 0.50394487f;
        y = y * r + 1.0f;
        y = y * r + 1.0f;
        return y * power;
    }
    vf r = c - t * 0.693359375f;  // ln 2 in two parts
    r = r + t * 2.12194440e-4f;
    vf y = splat(0.0013814539f);
    y = y * r + 0.0083687454f;
    y = y * r + 0.041668389f;
    y = y * r + 0.16666521f;
    y = y * r + 0.49999994f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    return y * power;
}

// To about 3 ulp: from e^(-2 |x|), and where that would lose digits by the first terms of the series.
static inline vf tanh(vf x) {
    vf size = x < 0.0f ? -x : x, t = exp(size * -2.0f), far = (1.0f - t) / (1.0f + t), square = x * x;
    vf near = splat(62.0f / 2835.0f);
    near = near * square - 17.0f / 315.0f;
    near = near * square + 2.0f / 15.0f;
    near = near * square - 1.0f / 3.0f;
    near = near * square * x + x;
    return size < 0.25f ? near : x < 0.0f ? -far : far;
}

// c (M x N vectors) = or += a (M x K, strides rs and cs) b (K rows of N vectors, ldb apart).
template <int M, int N>
static inline void tile(int64_t K, const float* a, int64_t rs, int64_t cs, const float* b, int64_t ldb, float* c,
                        int64_t ldc, bool add) {
    vf acc[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) acc[m][n] = add ? load(c + m * ldc + n * W) : vf{};
    for (int64_t k = 0; k < K; k++) {
        vf row[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) row[n] = load(b + k * ldb + n * W);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            vf x = splat(a[m * rs + k * cs]);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) acc[m][n] += x * row[n];
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) store(c + m * ldc + n * W, acc[m][n]);
}

template <int N, int M = MR>
static inline void strip(int rows, int64_t K, const float* a, int64_t rs, int64_t cs, const float* b, int64_t ldb,
                         float* c, int64_t ldc, bool add) {
    if constexpr (M > 0) {
        if (rows == M)
            tile<M, N>(K, a, rs, cs, b, ldb, c, ldc, add);
        else
            strip<N, M - 1>(rows, K, a, rs, cs, b, ldb, c, ldc, add);
    }
}

// As `tile` for any M and any N that is a multiple of W. Column panel p of b starts at b + p * panel.
__attribute__((noinline)) static void product(int64_t M, int64_t N, int64_t K, const float* a, int64_t rs, int64_t cs, const float* b,
                           int64_t ldb, int64_t panel, float* c, int64_t ldc, bool add) {
    for (int64_t n = 0; n < N; n += NR)
        for (int64_t m = 0; m < M; m += MR) {
            int rows = M - m < MR ? int(M - m) : MR;
            const float* at = b + n / NR * panel;
            if (N - n >= NR)
                strip<NV>(rows, K, a + m * rs, rs, cs, at, ldb, c + m * ldc + n, ldc, add);
            else
                for (int64_t j = 0; j < N - n; j += W)
                    strip<1>(rows, K, a + m * rs, rs, cs, at + j, ldb, c + m * ldc + n + j, ldc, add);
        }
}

#if defined(__AVX512F__)
#define EVEN 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30
#define ODD 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31
#define LEFT 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define RIGHT 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#elif defined(__AVX__)
#define EVEN 0, 2, 8, 10, 4, 6, 12, 14
#define ODD 1, 3, 9, 11, 5, 7, 13, 15
#define LEFT 0, 1, 2, 3, 8, 9, 10, 11
#define RIGHT 4, 5, 6, 7, 12, 13, 14, 15
#else
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#define LEFT 0, 1, 2, 3
#define RIGHT 4, 5, 6, 7
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

// The sums of W vectors, in their order: neighbours within quarters of 128 bits are added first, then the quarters.
static inline vf sums(vf* x) {
#pragma GCC unroll 8
    for (int n = W / 2; n >= 1; n /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            vf a = x[2 * i], b = x[2 * i + 1];
            x[i] = n >= W / 4 ? PICK(a, b, EVEN) + PICK(a, b, ODD) : PICK(a, b, LEFT) + PICK(a, b, RIGHT);
        }
    return x[0];
}
