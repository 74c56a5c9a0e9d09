// The gate: block means, scores, and each query's selected blocks. Always float32, and the same for
// one query as for many.
#pragma once
#include "cpu_plan.h"

// Means of the blocks, [BH][panels of NR blocks][D][NR], as the B operand of the scores.
struct Means {
    float* data = nullptr;
    int64_t panels = 0, D = 0;
    void take(Arena& arena, const Plan& plan) {
        D = plan.a.D;
        panels = ceil_div(plan.n, NR);
        if (!plan.dense) data = arena.take<float>(plan.BH * panels * D * NR);
    }
    const float* panel(int64_t bh, int64_t p) const { return data + (bh * panels + p) * D * NR; }

    // The mean of block j (keys added one by one, in ascending order); zero if it can never be a
    // candidate.
    template <class T>
    void compute(const Plan& plan, int64_t bh, int64_t j) {
        int64_t b = bh / plan.a.Hkv, h = bh % plan.a.Hkv, s = j * plan.block, e = s + plan.block;
        float* out = data + (bh * panels + j / NR) * D * NR + j % NR;
        bool complete = j >= plan.a.sinks && e < plan.real[b];
        const T* keys = row_of((const T*)plan.a.key, plan.a.key_at, b, h, 0);
        const int32_t* order = plan.order.empty() ? nullptr : plan.order.data() + b * plan.a.Nk;
        for (int64_t d = 0, width; d < D; d += width) {
            int64_t left = ceil_div(D - d, VL);  // registers
            width = std::min(D - d, (left >= 8 ? 8 : left >= 4 ? 4 : 1) * (int64_t)VL);
            float total[8 * VL] = {};
            auto sum = left >= 8 ? sum_keys<T, 8> : left >= 4 ? sum_keys<T, 4> : sum_keys<T, 1>;
            if (complete) sum(plan, keys + d, order, s, e, width, total);
            for (int64_t i = 0; i < width; ++i) out[(d + i) * NR] = total[i] / (float)plan.block;
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

// The rows of one unit (queries first..last of one kv head's group; row = (query - first) * G +
// head in group) and, for each block, the rows that selected it in ascending order: hence in
// ascending order of position.
struct Routes {
    int32_t *position, *count, *selected;  // [rows], [rows], [rows][topk]
    int32_t *start, *rows;                 // CSR by block (dense: rows are the identity)
    float *scores, *query, *value;
    int64_t* query_at;  // [rows]: where the row's query begins
    int64_t total, blocks, score_rows;
    int64_t bh, first;

    static int64_t rows_at_once(const Plan& plan) {
        int64_t at_once = 65536 / round_up(plan.n, NR) / MR * MR;
        return std::min<int64_t>(96, std::max<int64_t>(MR, at_once));
    }
    void take(Arena& arena, const Plan& plan, int64_t most) {
        score_rows = rows_at_once(plan);
        position = arena.take<int32_t>(most);
        count = arena.take<int32_t>(most);
        query_at = arena.take<int64_t>(most);
        start = arena.take<int32_t>(plan.n + 2);
        rows = arena.take<int32_t>(plan.dense ? most : most * plan.topk);
        if (plan.dense) return;
        selected = arena.take<int32_t>(most * plan.topk);
        scores = arena.take<float>(score_rows * round_up(plan.n, NR));
        query = arena.take<float>(score_rows * plan.a.D);
        value = arena.take<float>(plan.topk);
    }
    int64_t head(const Plan& plan, int64_t r) const {
        return bh % plan.a.Hkv * plan.G + r % plan.G;
    }
    int64_t token(const Plan& plan, int64_t r) const { return first + r / plan.G; }

    template <class T>
    void run(const Plan& plan, const Means& means, int64_t which, int64_t from, int64_t to) {
        bh = which;
        first = from;
        total = (to - from) * plan.G;
        int64_t b = bh / plan.a.Hkv, k = plan.topk, sinks = plan.a.sinks;
        int32_t last = -1, block = (int32_t)std::min<int64_t>(plan.block, INT32_MAX);
        for (int64_t i = 0, r = 0; i < to - from; ++i)
            for (int64_t g = 0; g < plan.G; ++g, ++r) {
                last = position[r] = plan.position[b * plan.a.Nq + from + i];
                query_at[r] = offset(plan.a.query_at, b, bh % plan.a.Hkv * plan.G + g, from + i);
            }
        blocks = last < 0 ? 0 : last / plan.block + 1;
        if (plan.dense) {
            for (int64_t r = 0; r < total; ++r) {
                rows[r] = (int32_t)r;
                count[r] = position[r] < 0 ? 0 : position[r] / (int32_t)plan.block + 1;
            }
            return;
        }
        int64_t width = round_up(plan.n, NR);
        for (int64_t r0 = 0; r0 < total; r0 += score_rows) {
            int64_t m = std::min(score_rows, total - r0);
            int64_t own = position[r0 + m - 1] < 0 ? 0 : position[r0 + m - 1] / plan.block;
            if (own >= k && k - 1 > sinks) {
                for (int64_t r = 0; r < m; ++r)
                    widen_row((const T*)plan.a.query + query_at[r0 + r], plan.a.D, plan.a.D,
                              query + r * plan.a.D);
                for (int64_t p = sinks / NR; p * NR < own; ++p)
                    for (int64_t g = 0; g < m; g += MR) {
                        int rows_now = (int)std::min<int64_t>(MR, m - g);
                        Rows<float> x;
                        float* c[MR];
                        for (int i = 0; i < rows_now; ++i) {
                            x.row[i] = query + (g + i) * plan.a.D;
                            c[i] = scores + (g + i) * width;
                        }
                        multiply<Float32, Rows<float>, SET>(rows_now, NV, x, means.panel(bh, p), NR,
                                                            plan.a.D, c, p * NR);
                    }
            }
            for (int64_t r = r0; r < r0 + m; ++r) {
                int32_t* out = selected + r * k;
                int32_t mine = position[r] / block;
                count[r] = position[r] < 0 ? 0 : (int32_t)std::min<int64_t>(mine + 1, k);
                if (mine < k) {
                    for (int32_t j = 0; j < count[r]; ++j) out[j] = j;
                    continue;
                }
                for (int32_t j = 0; j < sinks; ++j) out[j] = j;
                best_blocks(scores + (r - r0) * width, sinks, mine, k - 1 - sinks, value,
                            out + sinks);
                out[k - 1] = mine;
            }
        }
        std::fill(start, start + blocks + 2, 0);
        for (int64_t r = 0; r < total; ++r)
            for (int32_t i = 0; i < count[r]; ++i) ++start[selected[r * k + i] + 2];
        for (int64_t j = 2; j < blocks + 2; ++j) start[j] += start[j - 1];
        for (int64_t r = 0; r < total; ++r)
            for (int32_t i = 0; i < count[r]; ++i)
                rows[start[selected[r * k + i] + 1]++] = (int32_t)r;
    }
    // The rows of block j whose position is at least `reach`.
    const int32_t* of(const Plan& plan, int64_t j, int64_t reach, int64_t* size) const {
        const int32_t *lo = plan.dense ? rows : rows + start[j],
                      *hi = plan.dense ? rows + total : rows + start[j + 1];
        lo = std::partition_point(lo, hi, [&](int32_t r) { return position[r] < reach; });
        *size = hi - lo;
        return lo;
    }
};

// How many queries a unit takes: enough rows on each block to pay for reading it, few enough to
// share the work.
static inline int64_t queries_per_unit(const Plan& plan, int64_t units) {
    const Arguments& a = plan.a;
    int64_t history = std::max<int64_t>(1, plan.topk - 1);
    int64_t queries = plan.dense ? ceil_div(768, plan.G) : ceil_div(256 * plan.n, plan.G * history);
    queries = std::min(
        queries, std::max<int64_t>(1, std::min<int64_t>(8192, (1 << 20) / plan.topk) / plan.G));
    queries = std::min(queries, ceil_div(a.Nq * plan.BH, units));
    queries = std::max<int64_t>(queries, ceil_div(96, plan.G));
    return std::max<int64_t>(1, ceil_div(a.Nq, ceil_div(std::max<int64_t>(a.Nq, 1), queries)));
}
