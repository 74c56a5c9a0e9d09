// From products to probabilities: the score's modifiers, the mask inside a tile, the softmax.
#pragma once
#include "pack.h"

constexpr int64_t KEYS = 512;        // keys of a tile: with 128 channels, K^T and V take 512 KiB
constexpr int64_t LINE = KEYS + VL;  // leading dimension of a tile of scores

// A score in base 2 is log2(e) (c tanh(scale q.k / c) + bias), or log2(e) (scale q.k + bias)
// without a softcap c. The product's own factor is `alpha`; `cap` is log2(e) c, 0 for none.
//
// A row's scores are all less its `shift`, the largest bias that it sees: ALiBi's slope times key
// index grows with the sequence, and a sum with it would round away what is small beside it.
struct Modifiers {
    float alpha, cap;
    explicit Modifiers(const Arguments& a) {
        cap = (float)(a.softcap * LOG2E);
        alpha = a.softcap > 0 ? (float)(a.scale / a.softcap) : (float)a.scale * LOG2E;
    }
    static vf biased(vf x, const float* bias, float shift) {
        return mul_add(load(bias) - shift, splat(LOG2E), x);
    }
    // The row's logarithm in base 2, and back.
    static float lse2(float lse, float shift) { return (float)(((double)lse - shift) * LOG2E); }
    static float lse(float m, float l, float shift) {
        return (float)(m * (double)LN2 + std::log(l) + shift);
    }
    // Products become scores; bias is null or the bias of the first column.
    void apply(float* x, const float* bias, float shift, int64_t columns) const {
        if (cap > 0)
            for (int64_t c = 0; c < columns; c += VL) store(x + c, tanh_(load(x + c)) * cap);
        if (bias)
            for (int64_t c = 0; c < columns; c += VL)
                store(x + c, biased(load(x + c), bias + c, shift));
    }
};

// Zero (or -inf) outside columns lo..hi.
static inline vf keep(vf x, int64_t column, int64_t lo, int64_t hi, float other) {
    vi c = iota() + (int32_t)column;
    return ((c >= (int32_t)lo) & (c < (int32_t)hi)) ? x : splat(other);
}

static inline void round_to(vf p, float* out) { store(out, p); }
#ifdef MOONFX_BF16
static inline void round_to(vf p, bf16* out) {
    _mm256_storeu_si256((__m256i*)out, (__m256i)_mm512_cvtneps_pbh((__m512)p));
}
#endif

// Scores (base 2, scaled) of at most MR rows become probabilities against each row's running
// maximum *m; old sums are to be multiplied by factor. Row by row in three passes, so that rows
// overlap in each.
template <class T>
static inline void softmax(int rows, float* const* s, T* const* p, int64_t lo, const int64_t* hi,
                           int64_t columns, float* const* m, float* const* l, float* factor) {
    constexpr int padded = (MR + VL - 1) / VL * VL;
    float base[MR], step[padded] = {};
    for (int i = 0; i < rows; ++i) {
        float* x = s[i];
        if (lo > 0 || hi[i] < columns)
            for (int64_t c = 0; c < columns; c += VL)
                store(x + c, keep(load(x + c), c, lo, hi[i], -INFINITY));
        vf top = splat(-INFINITY), top2 = top;
        int64_t c = 0;
        for (; c + 2 * VL <= columns; c += 2 * VL) {
            top = larger(load(x + c), top);
            top2 = larger(load(x + c + VL), top2);
        }
        if (c < columns) top = larger(load(x + c), top);
        float now = std::max(maximum(larger(top, top2)), *m[i]);
        base[i] = now == -INFINITY ? 0.0f : now;
        step[i] = now == *m[i] ? 0.0f : *m[i] - now;
        *m[i] = now;
    }
    for (int i = 0; i < padded; i += VL) store(step + i, exp2_(load(step + i)));
    for (int i = 0; i < rows; ++i) {
        const float* x = s[i];
        vf total = vf{}, total2 = vf{};
        int64_t c = 0;
        for (; c + 2 * VL <= columns; c += 2 * VL) {
            vf y = exp2_(load(x + c) - base[i]), z = exp2_(load(x + c + VL) - base[i]);
            round_to(y, p[i] + c);
            round_to(z, p[i] + c + VL);
            total += y;
            total2 += z;
        }
        if (c < columns) {
            vf y = exp2_(load(x + c) - base[i]);
            round_to(y, p[i] + c);
            total += y;
        }
        factor[i] = step[i];
        *l[i] = *l[i] * step[i] + sum(total + total2);
    }
}
