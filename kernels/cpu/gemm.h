// The one matrix product: C[M rows][V registers] (+)= A[M][K] B[K][V registers], all of C in
// registers.
//
// Each value of C is one chain of fused multiply-adds over K in ascending order, whatever M and V
// are: a row's result does not depend on which rows or columns stand beside it. A word is one
// float32, or two bfloat16 that are neighbours along K (one VDPBF16PS step).
#pragma once
#include "simd.h"

struct Float32 {
    typedef float word;
    typedef float element;
    static constexpr int per_word = 1;
    static inline vf step(vf c, word a, vf b) { return mul_add(splat(a), b, c); }
    static inline vf fetch(const word* p) { return load(p); }
};

#ifdef MOONFX_BF16
struct BFloat16 {
    typedef uint32_t word;
    typedef bf16 element;
    static constexpr int per_word = 2;
    static inline vf step(vf c, word a, __m512i b) {
        return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
    }
    static inline __m512i fetch(const word* p) { return _mm512_loadu_si512(p); }
};
#endif

// Rows of A by pointer (row tiles are gathered, and P's rows are strided).
template <class W>
struct Rows {
    const W* row[MR];
    inline W at(int r, int64_t k) const { return row[r][k]; }
};
// A is stored transposed: the rows of C are neighbours in memory.
template <class W>
struct Columns {
    const W* base;
    int64_t stride;
    inline W at(int r, int64_t k) const { return base[k * stride + r]; }
};

enum Mode { SET, ADD };  // C = alpha * A B, or C += A B

template <class E, class A, Mode mode, int M, int V>
static void micro(const A& rows, const typename E::word* b, int64_t ldb, int64_t depth,
                  float* const* c, int64_t offset, float alpha) {
    A a = rows;
    vf acc[M][V];
    for (int r = 0; r < M; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = vf{};
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k) {
        decltype(E::fetch(b)) x[V];
        for (int v = 0; v < V; ++v) x[v] = E::fetch(b + v * VL);
        for (int r = 0; r < M; ++r) {
            typename E::word w = a.at(r, k);
            for (int v = 0; v < V; ++v) acc[r][v] = E::step(acc[r][v], w, x[v]);
        }
        b += ldb;
    }
    for (int r = 0; r < M; ++r) {
        float* p = c[r] + offset;
        for (int v = 0; v < V; ++v)
            store(p + v * VL, mode == SET ? acc[r][v] * alpha : load(p + v * VL) + acc[r][v]);
    }
}

template <class E, class A, Mode mode, int M>
static inline void micro_v(int v, const A& a, const typename E::word* b, int64_t ldb, int64_t depth,
                           float* const* c, int64_t offset, float alpha) {
    if (v == NV) return micro<E, A, mode, M, NV>(a, b, ldb, depth, c, offset, alpha);
    if (NV > 2 && v == 3)
        return micro<E, A, mode, M, NV == 4 ? 3 : 1>(a, b, ldb, depth, c, offset, alpha);
    if (NV > 2 && v == 2)
        return micro<E, A, mode, M, NV == 4 ? 2 : 1>(a, b, ldb, depth, c, offset, alpha);
    micro<E, A, mode, M, 1>(a, b, ldb, depth, c, offset, alpha);
}

// m rows (1..MR), v registers (1..NV).
template <class E, class A, Mode mode>
static inline void multiply(int m, int v, const A& a, const typename E::word* b, int64_t ldb,
                            int64_t depth, float* const* c, int64_t offset, float alpha = 1.0f) {
    switch (m) {
        case 6:
            return micro_v<E, A, mode, 6>(v, a, b, ldb, depth, c, offset, alpha);
        case 5:
            return micro_v<E, A, mode, 5>(v, a, b, ldb, depth, c, offset, alpha);
        case 4:
            return micro_v<E, A, mode, 4>(v, a, b, ldb, depth, c, offset, alpha);
        case 3:
            return micro_v<E, A, mode, 3>(v, a, b, ldb, depth, c, offset, alpha);
        case 2:
            return micro_v<E, A, mode, 2>(v, a, b, ldb, depth, c, offset, alpha);
        default:
            return micro_v<E, A, mode, 1>(v, a, b, ldb, depth, c, offset, alpha);
    }
}
