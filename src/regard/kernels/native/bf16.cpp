// Softmax attention over a block layout in bf16, multiplied by instructions for it: the tile registers of AMX, or dot
// products of pairs. Statistics and sums in fp32. Forward only.
//
// A tile register holds 16 rows of 64 bytes. Products take the left matrix as it lies and the right one with pairs of
// rows interleaved, so keys are laid out once as (panels of 16 keys, D / 2, 16 keys, 2) and values as
// (panels of 16 columns, S / 2, 16 columns, 2).
#include "attention.h"

#if defined(__AVX512BF16__)
#if defined(__AMX_BF16__) && defined(__linux__)
#define TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {
constexpr int64_t R = 16, PAIR = 32;  // rows of a tile; what one multiplication of tiles sums over

inline __m512bh pairs(const void* p) {
    __m512bh x;
    memcpy(&x, p, sizeof x);
    return x;
}

// c (24 x 32 n, fp32) = or += a (24 x 32 k) b (32 k x 32 n). Columns of b come in panels of 16, `panel` numbers apart.
struct Pairs {
    static constexpr int64_t STRIP = 24;
    static void configure() {}
    static void release() {}
    static void product(int64_t n, int64_t k, const bf16* a, int64_t lda, const bf16* b, int64_t panel, float* c,
                        int64_t ldc, bool add) {
        constexpr int64_t M = STRIP / 2;
        for (int64_t j = 0; j < 2 * n; j++) {
            const bf16 *left = b + j / 2 * 2 * panel, *right = left + panel, *rows = a + j % 2 * M * lda;
            float* to = c + j / 2 * 2 * R + j % 2 * M * ldc;
            __m512 acc[M][2];
#pragma GCC unroll 12
            for (int64_t m = 0; m < M; m++)
#pragma GCC unroll 2
                for (int64_t i = 0; i < 2; i++) acc[m][i] = add ? (__m512)load(to + m * ldc + i * R) : _mm512_setzero_ps();
            for (int64_t i = 0; i < k * R; i++) {
                __m512bh y = pairs(left + i * PAIR), z = pairs(right + i * PAIR);
#pragma GCC unroll 12
                for (int64_t m = 0; m < M; m++) {
                    int32_t two;
                    memcpy(&two, rows + m * lda + 2 * i, 4);
                    __m512bh x = (__m512bh)_mm512_set1_epi32(two);
                    acc[m][0] = _mm512_dpbf16_ps(acc[m][0], x, y);
                    acc[m][1] = _mm512_dpbf16_ps(acc[m][1], x, z);
                }
            }
#pragma GCC unroll 12
            for (int64_t m = 0; m < M; m++)
#pragma GCC unroll 2
                for (int64_t i = 0; i < 2; i++) store(to + m * ldc + i * R, (vf)acc[m][i]);
        }
    }
};

#ifdef TILES
// Linux lends the tile registers to those who ask.
bool lent() {
    constexpr int REQUEST = 0x1023, WHAT = 18;
    return syscall(SYS_arch_prctl, REQUEST, WHAT) == 0;
}

// As above, of 32 rows.
struct Tiles {
    static constexpr int64_t STRIP = 32;
    static void configure() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        _tile_loadconfig(&shape);
    }
    static void release() { _tile_release(); }
    static void product(int64_t n, int64_t k, const bf16* a, int64_t lda, const bf16* b, int64_t panel, float* c,
                        int64_t ldc, bool add) {
        for (int64_t j = 0; j < n; j++) {
            float* to = c + j * 2 * R;
            const bf16 *left = b + 2 * j * panel, *right = left + panel;
            if (add) {
                _tile_loadd(0, to, ldc * 4);
                _tile_loadd(1, to + R, ldc * 4);
                _tile_loadd(2, to + R * ldc, ldc * 4);
                _tile_loadd(3, to + R * ldc + R, ldc * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int64_t i = 0; i < k; i++) {
                _tile_loadd(4, a + i * PAIR, lda * 2);
                _tile_loadd(6, left + i * PAIR * R, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, right + i * PAIR * R, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, a + R * lda + i * PAIR, lda * 2);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, to, ldc * 4);
            _tile_stored(1, to + R, ldc * 4);
            _tile_stored(2, to + R * ldc, ldc * 4);
            _tile_stored(3, to + R * ldc + R, ldc * 4);
        }
    }
};
#endif

inline void narrow(bf16* to, vf x) {
    __m256bh y = _mm512_cvtneps_pbh((__m512)x);
    memcpy(to, &y, sizeof y);
}

inline bool finite(const bf16* x, int64_t n) {  // n is a multiple of 32
    vh bad = {};
    for (int64_t j = 0; j < n; j += W) bad |= (vh)((halves(x + j) & 0x7f80) == 0x7f80);
    uint64_t any[4];
    memcpy(any, &bad, sizeof any);
    return !(any[0] | any[1] | any[2] | any[3]);
}

template <class Product>
struct Bf16 {
    static constexpr int64_t STRIP = Product::STRIP, GRAIN = PAIR;
    static constexpr bool ROUGH = true;
    const Attention* p;
    float* o;
    bf16 *q, *weights, *out;
    const bf16 *kt, *vt;
    int64_t wide;  // keys, filled up

    explicit Bf16(const Attention& p) {
        o = new (std::align_val_t(64)) float[(p.bq + STRIP) * p.V];
        q = new (std::align_val_t(64)) bf16[(p.bq + STRIP) * p.D];
        weights = new (std::align_val_t(64)) bf16[STRIP * MOST];
    }
    ~Bf16() {
        operator delete[](o, std::align_val_t(64));
        operator delete[](q, std::align_val_t(64));
        operator delete[](weights, std::align_val_t(64));
    }
    void at(const Attention& given, int64_t b, int64_t h, int64_t first, int64_t count) {
        p = &given, wide = cut(p->S, PAIR) * PAIR;
        int64_t g = h / (p->H / p->G);
        for (int64_t i = 0; i < cut(count, STRIP) * STRIP; i++)
            if (i < count)
                memcpy(q + i * p->D, p->q.at<bf16>(b, h, first + i), p->D * 2);
            else
                memset(q + i * p->D, 0, p->D * 2);
        if (!finite(q, count * p->D)) *p->odd = 1;
        std::fill(o + count * p->V, o + (count + STRIP) * p->V, 0.0f);
        kt = (const bf16*)p->kt + (b * p->G + g) * wide * p->D;
        vt = (const bf16*)p->vt + (b * p->G + g) * wide * p->V;
        out = p->out.at<bf16>(b, h, 0);
    }
    void keys(int64_t, int64_t) {}
    void scores(int64_t m, int64_t, int64_t s, int64_t width, float* x) {
        Product::product(width / 32, p->D / PAIR, q + m * p->D, p->D, kt + s * p->D, R * p->D, x, MOST, false);
    }
    void weigh(float*, int64_t i, int64_t j, vf y) { narrow(weights + i * MOST + j, y); }
    void values(int64_t m, int64_t rows, int64_t s, int64_t used, const float*) {
        int64_t width = cut(used, PAIR) * PAIR;
        for (int64_t i = rows; i < STRIP; i++) memset(weights + i * MOST, 0, width * 2);
        Product::product(p->V / 32, width / PAIR, weights, MOST, vt + s * R, R * wide, o + m * p->V, p->V, true);
    }
    void write(int64_t t, const float* from, float by) {
        for (int64_t d = 0; d < p->V; d += W) narrow(out + t * p->out.t + d, load(from + d) * by);
    }
};

void packed(const Attention& p) {
    int64_t wide = cut(p.S, PAIR) * PAIR;
    typedef uint32_t two;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.B * p.G * wide / R; i++) {
        int64_t bg = i / (wide / R), s = i % (wide / R) * R;
        two* k = (two*)((bf16*)p.kt + (bg * wide + s) * p.D);
        bf16* v = (bf16*)p.vt + bg * wide * p.V + s * R;
        for (int64_t j = 0; j < R; j++) {
            const bf16* key = p.k.at<bf16>(bg / p.G, bg % p.G, std::min(s + j, p.S - 1));
            if (!finite(key, p.D)) *p.odd = 1;
        }
        for (int64_t d = 0; d < p.D / 2; d += R)  // 16 x 16 pairs change sides: what is read and written stays near
            for (int64_t j = 0; j < R; j++) {
                const bf16* key = p.k.at<bf16>(bg / p.G, bg % p.G, std::min(s + j, p.S - 1)) + 2 * d;
                two row[R] = {};
                if (s + j < p.S) memcpy(row, key, sizeof row);
                for (int64_t e = 0; e < R; e++) k[(d + e) * R + j] = row[e];
            }
        for (int64_t j = 0; j < R; j += 2) {
            const bf16* even = p.v.at<bf16>(bg / p.G, bg % p.G, std::min(s + j, p.S - 1));
            const bf16* odd = p.v.at<bf16>(bg / p.G, bg % p.G, std::min(s + j + 1, p.S - 1));
            for (int64_t d = 0; d < p.V; d += R) {
                vi low = s + j < p.S ? __builtin_convertvector(halves(even + d), vi) : vi{};
                vi high = s + j + 1 < p.S ? __builtin_convertvector(halves(odd + d), vi) : vi{};
                vi both = low | high << 16;
                memcpy(v + d * wide + j * R, &both, sizeof both);
            }
        }
    }
}

template <class Product>
void run(const Attention& p) {
#pragma omp parallel num_threads(p.threads)
    {
        packed(p);
        Product::configure();
        Bf16<Product> unit(p);
        forward(p, unit);
        Product::release();
    }
}
}  // namespace

// 2: on tile registers; 1: by pairs; 0: nothing here multiplies bf16.
extern "C" int regard_bf16() {
#ifdef TILES
    static bool have = lent();
    return have ? 2 : 1;
#else
    return 1;
#endif
}

extern "C" void regard_attention_bf16(const Attention* p) {
#ifdef TILES
    if (p->amx) return run<Tiles>(*p);
#endif
    run<Pairs>(*p);
}
#else
extern "C" int regard_bf16() { return 0; }
extern "C" void regard_attention_bf16(const Attention*) {}
#endif
