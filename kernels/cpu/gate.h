// The gate's parts: block means, and the best of a row's scores. Always float32, and the same for
// one query as for many.
#pragma once
#include "pack.h"

// Means of the blocks of every list that is not dense, [Hkv][panels of NR blocks][D][width], as the
// B operand of the scores; and the mean key bias over the scale, [1 or Hq][blocks].
struct Means {
    float *data = nullptr, *bias = nullptr;
    int64_t columns = 0, D = 0;
    Bias heads{};

    void take(Arena& arena, const Plan& plan, const Bias& packed) {
        D = plan.a.D;
        columns = plan.mean_columns;
        heads = packed;
        if (columns) data = arena.take<float>(plan.a.Hkv * columns * D);
        if (heads.heads) bias = arena.take<float>(heads.heads * columns);
    }
    const float* panel(const List& x, int64_t h, int64_t p) const {
        return data + (h * columns + x.means + p * NR) * D;
    }
    static int64_t width(const List& x, int64_t p) {
        return std::min<int64_t>(NR, round_up(x.n, VL) - p * NR);
    }
    const float* bias_of(const List& x, int64_t head) const {
        return bias ? bias + (heads.heads > 1 ? head : 0) * columns + x.means : nullptr;
    }

    // A causal query's candidates end before its own block, so the last block is never one.
    static bool candidate(const Plan& plan, const List& x, int64_t j) {
        return j >= plan.a.sinks && (j + (plan.a.causal ? 1 : 0)) * x.block < x.real;
    }
    // The mean of block j (keys added one by one, in ascending order); zero if it can never be a
    // candidate.
    template <class T>
    void compute(const Plan& plan, const List& x, int64_t h, int64_t j) {
        int64_t s = j * x.block, e = std::min(s + x.block, x.real), ldb = width(x, j / NR);
        float* out = (float*)panel(x, h, j / NR) + j % NR;
        bool candidate = Means::candidate(plan, x, j);
        const T* keys = row_of((const T*)plan.a.key, plan.a.key_at, x.b, h, 0);
        const int32_t* order = plan.order.empty() ? nullptr : plan.order.data() + x.keys;
        for (int64_t d = 0, width; d < D; d += width) {
            int64_t left = ceil_div(D - d, VL);  // registers
            width = std::min(D - d, (left >= 8 ? 8 : left >= 4 ? 4 : 1) * (int64_t)VL);
            float total[8 * VL] = {};
            auto sum = left >= 8 ? sum_keys<T, 8> : left >= 4 ? sum_keys<T, 4> : sum_keys<T, 1>;
            if (candidate) sum(plan, keys + d, order, s, e, width, total);
            for (int64_t i = 0; i < width; ++i)
                out[(d + i) * ldb] = candidate ? total[i] / (float)(e - s) : 0.0f;
        }
        compute_bias(plan, x, h, j);
    }
    // Those of panel p as the caller gave them, in place of all that.
    void copy(const Plan& plan, const List& x, int64_t h, int64_t p) {
        const float* row[NR];
        int64_t ldb = width(x, p);
        float* out = (float*)panel(x, h, p);
        for (int64_t c = 0; c < ldb; ++c) {
            int64_t j = p * NR + c;
            bool read = j < x.n && candidate(plan, x, j);
            row[c] = read ? row_of(plan.a.block_means, plan.a.block_means_at, x.b, h, j) : nullptr;
            if (j < x.n) compute_bias(plan, x, h, j);
        }
        transpose(row, ldb, D, ldb, out);
    }
    void compute_bias(const Plan& plan, const List& x, int64_t h, int64_t j) {
        int64_t s = j * x.block, e = std::min(s + x.block, x.real);
        bool candidate = Means::candidate(plan, x, j);
        auto [head, end] = heads.heads_of(plan, h);
        for (; head < end; ++head) {
            const float* b = plan.a.key_bias + offset(plan.a.key_bias_at, x.b, head, 0);
            float total = 0.0f;
            for (int64_t r = s; candidate && r < e; ++r)
                total += b[plan.key_index(x, r) * plan.a.key_bias_at.token];
            bias[head * columns + x.means + j] =
                candidate ? total / (float)(e - s) / (float)plan.a.scale : 0.0f;
        }
    }
    template <class T, int R>
    static void sum_keys(const Plan& plan, const T* keys, const int32_t* order, int64_t s,
                         int64_t e, int64_t width, float* total) {
        vf acc[R];
        for (int v = 0; v < R; ++v) acc[v] = vf{};
        for (int64_t r = s; r < e; ++r) {
            const T* key = keys + (order ? order[r] : r) * plan.a.key_at.token;
            if (width == R * VL) {
                for (int v = 0; v < R; ++v) acc[v] += widen(key + v * VL);
            } else {
                float t[R * VL];
                widen_row(key, width, R * VL, t);
                for (int v = 0; v < R; ++v) acc[v] += load(t + v * VL);
            }
        }
        for (int v = 0; v < R; ++v) store(total + v * VL, acc[v]);
    }
};

// best_blocks by k rounds without branches; false, with s unharmed, where that is slower or a
// choice is -inf.
static inline bool few_best_blocks(float* s, int64_t lo, int64_t hi, int64_t k, int32_t* index) {
#ifdef __AVX512F__
    constexpr int MOST = 8;  // registers
    int64_t first = lo / VL * VL;
    int registers = (int)ceil_div(hi - first, VL);
    if (registers > MOST || k * registers > 32) return false;
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    __m512 x[MOST];
    for (int i = 0; i < registers; ++i)
        x[i] = _mm512_max_ps(_mm512_loadu_ps(s + first + i * VL), lowest);
    x[0] = _mm512_mask_mov_ps(x[0], (__mmask16)((1u << (lo - first)) - 1), lowest);
    x[registers - 1] = _mm512_mask_mov_ps(
        x[registers - 1], (__mmask16) ~((1u << (hi - first - (registers - 1) * VL)) - 1), lowest);
    for (int64_t j = 0; j < k; ++j) {
        __m512 top = x[0];
        for (int i = 1; i < registers; ++i) top = _mm512_max_ps(x[i], top);
        float best = maximum((vf)top);
        __m512 wanted = _mm512_set1_ps(best);
        uint64_t where[2] = {0, 0};
        for (int i = 0; i < registers; ++i)
            where[i / 4] |= (uint64_t)_mm512_cmp_ps_mask(x[i], wanted, _CMP_EQ_OQ) << (i % 4 * VL);
        if (best == -INFINITY || !(where[0] | where[1])) return false;
        int at = where[0] ? __builtin_ctzll(where[0]) : 64 + __builtin_ctzll(where[1]);
        index[j] = (int32_t)(first + at);
        for (int i = 0; i < registers; ++i)
            x[i] = _mm512_mask_mov_ps(x[i], (__mmask16)(at / VL == i ? 1u << at % VL : 0), lowest);
    }
    return true;
#else
    (void)s, (void)lo, (void)hi, (void)k, (void)index;
    return false;
#endif
}

// The k largest of s[lo..hi), the lower index first among equals; k <= hi - lo. NaN counts as -inf.
static inline void best_blocks(float* s, int64_t lo, int64_t hi, int64_t k, float* value,
                               int32_t* index) {
    if (k <= 0 || few_best_blocks(s, lo, hi, k, index)) return;
    int64_t filled = 0;
    auto insert = [&](int64_t j) {
        float x = s[j] == s[j] ? s[j] : -INFINITY;
        if (filled == k && !(x > value[k - 1])) return;
        int64_t i = filled < k ? filled++ : k - 1;
        for (; i > 0 && value[i - 1] < x; --i) {
            value[i] = value[i - 1];
            index[i] = index[i - 1];
        }
        value[i] = x;
        index[i] = (int32_t)j;
    };
    int64_t j = lo;
    for (; j < lo + k; ++j) insert(j);
#ifdef __AVX512F__
    for (; j + VL <= hi; j += VL) {
        vi above = load(s + j) > splat(value[k - 1]);
        uint64_t any[8];
        std::memcpy(any, &above, 64);
        if (any[0] | any[1] | any[2] | any[3] | any[4] | any[5] | any[6] | any[7])
            for (int64_t i = j; i < j + VL; ++i) insert(i);
    }
#endif
    for (; j < hi; ++j) insert(j);
}

// The k best of all blocks lo..hi but own, which is at least lo; two: room for 2 k indices.
static inline void best_but_own(float* s, int64_t lo, int64_t own, int64_t hi, int64_t k,
                                float* value, int32_t* two, int32_t* index) {
    int64_t left = std::min(k, own - lo), right = std::min(k, hi - own - 1);
    int32_t *a = two, *b = two + k;
    best_blocks(s, lo, own, left, value, a);
    best_blocks(s, own + 1, hi, right, value, b);
    auto score = [&](int32_t j) { return s[j] == s[j] ? s[j] : -INFINITY; };
    for (int32_t *a_end = a + left, *b_end = b + right; k > 0; --k) {
        bool first = b == b_end || (a < a_end && score(*a) >= score(*b));
        *index++ = first ? *a++ : *b++;
    }
}
