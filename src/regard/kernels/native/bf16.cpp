// Softmax attention over a block layout in bf16 on the tile registers of AMX; statistics and sums in fp32. Forward only.
//
// A tile register holds 16 rows of 64 bytes. Products take the left matrix as it lies and the right one with pairs of
// rows interleaved, so keys are laid out once as (panels of 16 keys, D / 2, 16 keys, 2) and values as
// (panels of 16 columns, S / 2, 16 columns, 2).
#include "attention.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

namespace {
typedef uint16_t bf16;
constexpr int64_t R = 16, PAIR = 32;  // rows of a tile; what one multiplication sums over

// Linux lends the tile registers to those who ask.
bool lent() {
    constexpr int REQUEST = 0x1023, TILES = 18;
    return syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
}

void configure() {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
}

// c (32 x 32 n, fp32) = or += a (32 x 32 k) b (32 k x 32 n). Columns of b come in panels of 16, `panel` numbers apart.
inline void product(int64_t n, int64_t k, const bf16* a, int64_t lda, const bf16* b, int64_t panel, float* c, int64_t ldc,
                    bool add) {
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

inline void narrow(const float* from, bf16* to, int64_t n, float by = 1.0f) {
    for (int64_t j = 0; j < n; j += 16) {
        __m256bh x = _mm512_cvtneps_pbh((__m512)(load(from + j) * by));
        memcpy(to + j, &x, 32);
    }
}

inline bool finite(const bf16* x, int64_t n) {
    int bad = 0;
    for (int64_t j = 0; j < n; j++) bad |= (x[j] & 0x7f80) == 0x7f80;
    return !bad;
}

struct Bf16 {
    static constexpr int64_t STRIP = 32, GRAIN = PAIR;
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
    void scores(int64_t m, int64_t, int64_t s, int64_t width, float* x) {
        product(width / 32, p->D / PAIR, q + m * p->D, p->D, kt + s * p->D, R * p->D, x, MOST, false);
    }
    void values(int64_t m, int64_t rows, int64_t s, int64_t used, const float* x) {
        int64_t width = cut(used, PAIR) * PAIR;
        for (int64_t i = 0; i < STRIP; i++)
            if (i < rows)
                narrow(x + i * MOST, weights + i * MOST, width);
            else
                memset(weights + i * MOST, 0, width * 2);
        product(p->V / 32, width / PAIR, weights, MOST, vt + s * R, R * wide, o + m * p->V, p->V, true);
    }
    void write(int64_t t, const float* from, float by) { narrow(from, out + t * p->out.t, p->V, by); }
};

void packed(const Attention& p) {
    int64_t wide = cut(p.S, PAIR) * PAIR;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.B * p.G * wide / R; i++) {
        int64_t bg = i / (wide / R), s = i % (wide / R) * R;
        bf16 *k = (bf16*)p.kt + (bg * wide + s) * p.D, *v = (bf16*)p.vt + bg * wide * p.V + s * R;
        for (int64_t j = 0; j < R; j++) {
            bool in = s + j < p.S;
            const bf16 *key = p.k.at<bf16>(bg / p.G, bg % p.G, in ? s + j : 0);
            const bf16 *value = p.v.at<bf16>(bg / p.G, bg % p.G, in ? s + j : 0);
            if (!finite(key, p.D)) *p.odd = 1;
            for (int64_t d = 0; d < p.D; d++) k[d / 2 * 2 * R + 2 * j + d % 2] = in ? key[d] : 0;
            for (int64_t d = 0; d < p.V; d++) v[d / R * R * wide + j / 2 * 2 * R + 2 * (d % R) + j % 2] = in ? value[d] : 0;
        }
    }
}
}  // namespace

extern "C" int regard_bf16() {
    static bool have = lent();
    return have;
}

extern "C" void regard_attention_bf16(const Attention* p) {
#pragma omp parallel num_threads(p->threads)
    {
        packed(*p);
        configure();
        Bf16 unit(*p);
        forward(*p, unit);
        _tile_release();
    }
}
#else
extern "C" int regard_bf16() { return 0; }
extern "C" void regard_attention_bf16(const Attention*) {}
#endif
