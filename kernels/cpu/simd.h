// Vector types of the compiler's vector extension, and the few functions that the kernels need on
// them.
//
// VL floats fill one register. A matrix product keeps MR rows of NV registers as accumulators, so
// 6 x 4 + 4 + 1 of 32 registers (AVX-512, NEON) or 6 x 2 + 2 + 1 of 16 (AVX2, SSE).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define MOONFX_BF16 1
#endif

#if defined(__AVX512F__)
#define VB 64
#elif defined(__AVX__)
#define VB 32
#else
#define VB 16
#endif

constexpr int VL = VB / 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int NV = 4;
#else
constexpr int NV = 2;
#endif
constexpr int NR = VL * NV;  // keys (or channels) in one panel
constexpr int MR = 6;        // rows in one register tile

typedef float vf __attribute__((vector_size(VB)));
typedef int32_t vi __attribute__((vector_size(VB)));
typedef float vf_any __attribute__((vector_size(VB), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(VB), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(VB / 2), aligned(2), may_alias));
typedef uint32_t vu __attribute__((vector_size(VB)));

typedef uint16_t bf16;

static inline vf load(const float* p) { return *(const vf_any*)p; }
static inline void store(float* p, vf x) { *(vf_any*)p = x; }
static inline vf splat(float x) { return x - vf{}; }  // x - 0 is x, -0 included
static inline vi splat(int32_t x) { return x - vi{}; }
static inline vi iota() {
    vi r;
    for (int i = 0; i < VL; ++i) r[i] = i;
    return r;
}

// a * b + c. Fused by name and never by the compiler's choice (-ffp-contract=off): GCC fuses one
// instance of a template and not the next, and a query's scores would then depend on how many
// queries stand beside it.
static inline vf mul_add(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// Column c of VL rows becomes row c.
static inline void transpose(vf* x) {
#if VB == 64
    __m512 t[VL], u[VL];
    for (int i = 0; i < VL; i += 2) {
        t[i] = _mm512_unpacklo_ps((__m512)x[i], (__m512)x[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps((__m512)x[i], (__m512)x[i + 1]);
    }
    for (int i = 0; i < VL; i += 4)
        for (int j = 0; j < 2; ++j) {
            __m512d a = (__m512d)t[i + j], b = (__m512d)t[i + j + 2];
            u[i + 2 * j] = (__m512)_mm512_unpacklo_pd(a, b);
            u[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(a, b);
        }
    for (int j = 0; j < 4; ++j) {  // u[4 i + j]: columns j, 4 + j, 8 + j, 12 + j of rows 4 i ..
        __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88),
               b = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd),
               c = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88),
               d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
        x[j] = (vf)_mm512_shuffle_f32x4(a, c, 0x88);
        x[4 + j] = (vf)_mm512_shuffle_f32x4(b, d, 0x88);
        x[8 + j] = (vf)_mm512_shuffle_f32x4(a, c, 0xdd);
        x[12 + j] = (vf)_mm512_shuffle_f32x4(b, d, 0xdd);
    }
#else
    float t[VL][VL];
    std::memcpy(t, x, sizeof t);
    for (int i = 0; i < VL; ++i)
        for (int j = 0; j < VL; ++j) x[i][j] = t[j][i];
#endif
}
static inline vf larger(vf a, vf b) { return a > b ? a : b; }

// The lanes are combined as a tree, so that the order never depends on the data's length.
template <class F>
static inline float reduce(vf x, F f) {
    float t[VL];
    std::memcpy(t, &x, sizeof x);
#if VB == 64
    typedef float v8 __attribute__((vector_size(32)));
    typedef float v4 __attribute__((vector_size(16)));
    v8 a, b;
    std::memcpy(&a, t, 32);
    std::memcpy(&b, t + 8, 32);
    a = f(a, b);
    v4 c, d;
    std::memcpy(&c, &a, 16);
    std::memcpy(&d, (const char*)&a + 16, 16);
    c = f(c, d);
    std::memcpy(t, &c, 16);
#elif VB == 32
    typedef float v4 __attribute__((vector_size(16)));
    v4 c, d;
    std::memcpy(&c, t, 16);
    std::memcpy(&d, t + 4, 16);
    c = f(c, d);
    std::memcpy(t, &c, 16);
#endif
    return f(f(t[0], t[2]), f(t[1], t[3]));
}
static inline float sum(vf x) {
    return reduce(x, [](auto a, auto b) { return a + b; });
}
static inline float maximum(vf x) {
    return reduce(x, [](auto a, auto b) { return a > b ? a : b; });
}

// 2^x for x <= 0 (in fact x < 127): 2^n times a degree 5 minimax polynomial of 2^(x-n), relative
// error 1e-7 before rounding; exactly 1 for 0, exactly 0 for -inf; NaN stays NaN.
static inline vf exp2_(vf x) {
#ifdef __AVX512DQ__
    vf f = (vf)_mm512_reduce_ps((__m512)x, 9);  // x - floor(x), 0 for -inf
    vf y = mul_add(f, splat(0.00186713032f), splat(0.00901702979f));
    y = mul_add(y, f, splat(0.0557999135f));
    y = mul_add(y, f, splat(0.24016445f));
    y = mul_add(y, f, splat(0.693151312f));
    y = mul_add(y, f, splat(1.0f));
    return (vf)_mm512_scalef_ps((__m512)y, (__m512)x);  // y * 2^floor(x)
#else
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    const float magic = 12582912.0f;
    x = splat(-127.0f) > x ? splat(-127.0f) : x;
    vf t = x + magic;
    vf f = x - (t - magic);
    vf y = mul_add(f, splat(1.32647270e-3f), splat(9.67151276e-3f));
    y = mul_add(y, f, splat(5.55073374e-2f));
    y = mul_add(y, f, splat(2.40222421e-1f));
    y = mul_add(y, f, splat(6.93146978e-1f));
    y = mul_add(y, f, splat(1.0f));
    return y * (vf)(((vi)t + 127) << 23);
#endif
}

// tanh: (1 - e) / (1 + e) with e = exp(-2 |x|), and for small |x|, where 1 - e cancels, an odd
// minimax polynomial of degree 11 (relative error 3e-9). At most 3 units in the last place off; NaN
// stays NaN.
static inline vf tanh_(vf x) {
    vf size = x < 0 ? -x : x, z = x * x;
    vf y = mul_add(z, splat(-0.00589515705f), splat(0.0207959706f));
    y = mul_add(y, z, splat(-0.0537838297f));
    y = mul_add(y, z, splat(0.133319241f));
    y = mul_add(y, z, splat(-0.33333298f));
    vf small = mul_add(y * z, x, x);
    vf e = exp2_(size * splat(-2.88539008f));
    vf large = (splat(1.0f) - e) / (splat(1.0f) + e);
    return size < 0.6f ? small : (x < 0 ? -large : large);
}

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    uint32_t u = (uint32_t)x << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
static inline void from_float(float x, float* p) { *p = x; }
static inline void from_float(float x, bf16* p) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    *p = x != x ? (bf16)((u >> 16) | 64) : (bf16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline vf widen(const float* p) { return load(p); }
static inline vf widen(const bf16* p) {
    return (vf)(__builtin_convertvector(*(const vh_any*)p, vu) << 16);
}
// The columns, each of d values (null: zeros), as the rows of a product's B operand.
template <class T>
static inline void transpose(const T* const* column, int64_t columns, int64_t d, int64_t ldb,
                             float* out) {
    for (int64_t c = 0; c < columns; c += VL)
        for (int64_t i = 0; i < d; i += VL) {
            vf x[VL];
            for (int r = 0; r < VL; ++r) {
                const T* p = c + r < columns ? column[c + r] : nullptr;
                float t[VL] = {};
                if (p && i + VL > d)
                    for (int64_t e = 0; e < d - i; ++e) t[e] = to_float(p[i + e]);
                x[r] = p && i + VL <= d ? widen(p + i) : load(t);
            }
            transpose(x);
            for (int64_t e = 0; e < std::min<int64_t>(VL, d - i); ++e)
                store(out + (i + e) * ldb + c, x[e]);
        }
}
// d values to float32, zeros up to padded.
template <class T>
static inline void widen_row(const T* p, int64_t d, int64_t padded, float* out) {
    int64_t i = 0;
    for (; i + VL <= d; i += VL) store(out + i, widen(p + i));
    for (; i < d; ++i) out[i] = to_float(p[i]);
    for (; i < padded; ++i) out[i] = 0.0f;
}
