// Forward over units: a unit routes its rows, then meets each KV block once, in ascending order.
//
// Six rows at a time stay in registers and L1: S = Q K^T for a key tile, P = exp(S - m), O += P V; only O, m and l
// live on in the unit's scratch. A key tile (packed K^T and V) stays in L2 while all the rows of the unit pass over it.
#pragma once
#include "cpu_route.h"

constexpr int64_t KEYS = 256;         // keys of a tile: K^T and V of 256 keys x 128 channels are 256 KiB
constexpr int64_t LINE = KEYS + VL;   // leading dimension of a tile of scores

// Zero (or -inf) outside columns lo..hi.
static inline vf keep(vf x, int64_t column, int64_t lo, int64_t hi, float other) {
    vi c = iota() + (int32_t)column;
    return (c >= (int32_t)lo) & (c < (int32_t)hi) ? x : splat(other);
}

static inline void round_to(vf p, float* out) { store(out, p); }
#ifdef MOONFX_BF16
static inline void round_to(vf p, bf16* out) { _mm256_storeu_si256((__m256i*)out, (__m256i)_mm512_cvtneps_pbh((__m512)p)); }
#endif

// One row of scores (base 2, scaled) to probabilities against the running maximum m; returns the factor of old sums.
template <class T>
static inline float softmax_row(float* s, T* p, int64_t lo, int64_t hi, int64_t columns, float* m, float* l) {
    vf top = splat(-INFINITY);
    if (lo > 0 || hi < columns)
        for (int64_t c = 0; c < columns; c += VL) store(s + c, keep(load(s + c), c, lo, hi, -INFINITY));
    vf top2 = top;
    int64_t c = 0;
    for (; c + 2 * VL <= columns; c += 2 * VL) {
        top = larger(load(s + c), top);
        top2 = larger(load(s + c + VL), top2);
    }
    if (c < columns) top = larger(load(s + c), top);
    float now = std::max(maximum(larger(top, top2)), *m);
    float base = now == -INFINITY ? 0.0f : now;
    vf total = vf{}, total2 = vf{};
    for (c = 0; c + 2 * VL <= columns; c += 2 * VL) {
        vf x = exp2_(load(s + c) - base), y = exp2_(load(s + c + VL) - base);
        round_to(x, p + c);
        round_to(y, p + c + VL);
        total += x;
        total2 += y;
    }
    if (c < columns) {
        vf x = exp2_(load(s + c) - base);
        round_to(x, p + c);
        total += x;
    }
    float factor = now == *m ? 1.0f : exp2_(splat(*m - base))[0];
    *l = *l * factor + sum(total + total2);
    *m = now;
    return factor;
}

template <class E>
struct Forward {
    typedef typename E::word word;
    typedef typename E::element element;
    const Plan& plan;
    const Arguments& a;
    Means means{};
    Packed<E> key{}, value{};

    struct Thread {
        Routes routes;
        float *out, *m, *l, *scores;
        element* probabilities;
        word* query;
    };
    void take(Arena& arena, Thread& t, int64_t rows) {
        t.routes.take(arena, plan, rows);
        t.out = arena.take<float>(rows * value.padded);
        t.m = arena.take<float>(rows);
        t.l = arena.take<float>(rows);
        t.scores = arena.take<float>(MR * LINE);
        t.probabilities = E::per_word == 1 ? (element*)t.scores : arena.take<element>(MR * LINE);
        t.query = arena.take<word>(MR * words<E>(a.D));
    }

    // Rows `id` (at most MR, ascending positions) against keys rank tile..; the block is keys first..last.
    void group(Thread& t, const int32_t* id, int m, int64_t tile, int64_t first, int64_t last) {
        const Routes& routes = t.routes;
        int64_t bh = routes.bh, b = bh / a.Hkv, w = words<E>(a.D);
        int64_t lo = std::max<int64_t>(first - tile, 0), hi[MR];
        Rows<word> rows;
        float* c[MR];
        for (int i = 0; i < m; ++i) {
            int64_t r = id[i];
            hi[i] = std::min<int64_t>(std::min<int64_t>(last, routes.position[r] + 1) - tile, KEYS);
            copy_words<E>(row_of((const element*)a.query, a.query_at, b, routes.head(plan, r), routes.token(plan, r)),
                          a.D, t.query + i * w);
            rows.row[i] = t.query + i * w;
            c[i] = t.scores + i * LINE;
        }
        int64_t most = hi[m - 1], columns = round_up(most, VL);
        float scale = (float)a.scale * LOG2E;
        for (int64_t p = 0; p < columns; p += NR)
            multiply<E, Rows<word>, SET>(m, (int)std::min<int64_t>(NV, (columns - p) / VL), rows,
                                         key.panel(bh, (tile + p) / NR), NR, w, c, p, scale);
        int64_t from = lo / E::per_word;
        for (int i = 0; i < m; ++i) {
            int64_t r = id[i];
            element* p = t.probabilities + i * LINE;
            float factor = softmax_row(c[i], p, lo, hi[i], columns, t.m + r, t.l + r);
            float* out = t.out + r * value.padded;
            if (factor != 1.0f)
                for (int64_t d = 0; d < value.padded; d += VL) store(out + d, load(out + d) * factor);
            rows.row[i] = (const word*)p + from;
            c[i] = out;
        }
        const word* v = value.from(bh, tile) + from * value.padded;
        for (int64_t d = 0; d < value.padded; d += NR)
            multiply<E, Rows<word>, ADD>(m, (int)std::min<int64_t>(NV, (value.padded - d) / VL), rows, v + d,
                                         value.padded, words<E>(most) - from, c, d);
    }

    void unit(Thread& t, int64_t bh, int64_t from, int64_t to) {
        Routes& routes = t.routes;
        int64_t b = bh / a.Hkv;
        routes.template run<element>(plan, means, bh, from, to);
        std::fill(t.m, t.m + routes.total, -INFINITY);
        std::fill(t.l, t.l + routes.total, 0.0f);
        std::memset(t.out, 0, routes.total * value.padded * sizeof(float));
        for (int64_t j = 0; j < routes.blocks; ++j) {
            int64_t first = j * plan.block, last = std::min<int64_t>(first + plan.block, plan.real[b]);
            for (int64_t tile = first / NR * NR; tile < last; tile += KEYS) {
                int64_t size;
                const int32_t* id = routes.of(plan, j, std::max(first, tile), &size);
                if (!size) break;
                for (int64_t g = 0; g < size; g += MR)
                    group(t, id + g, (int)std::min<int64_t>(MR, size - g), tile, first, std::min(last, tile + KEYS));
            }
        }
        for (int64_t r = 0; r < routes.total; ++r) {
            bool seen = routes.count[r] > 0;
            int64_t h = routes.head(plan, r), i = routes.token(plan, r);
            float inverse = seen ? 1.0f / t.l[r] : 0.0f;
            const float* o = t.out + r * value.padded;
            element* out = row_of((element*)a.out, a.out_at, b, h, i);
            for (int64_t d = 0; d < a.Dv; ++d) from_float(o[d] * inverse, out + d);
            a.lse[(b * a.Hq + h) * a.Nq + i] = seen ? t.m[r] * LN2 + std::log(t.l[r]) : -INFINITY;
        }
    }

    int64_t run() {
        int64_t queries = queries_per_unit(plan, 4 * a.threads), chunks = ceil_div(a.Nq, queries);
        Arena count{nullptr};
        auto shared = [&](Arena& arena) {
            means.take(arena, plan);
            key.take(arena, plan, a.D, true, false);
            value.take(arena, plan, a.Dv, false, true);
        };
        shared(count);
        Thread t;
        int64_t common = count.used;
        take(count, t, queries * plan.G);
        int64_t each = count.used - common, bytes = common + each * a.threads;
        Scratch scratch(bytes);
        if (!scratch.base) return FAILED;
        Arena arena{scratch.base};
        shared(arena);
        std::vector<Thread> threads(a.threads);
        for (Thread& thread : threads) take(arena, thread, queries * plan.G);

        int64_t packs = plan.BH * key.panels, pooled = plan.dense ? 0 : plan.BH * plan.n;
        parallel(a.threads, packs + pooled, [&](int64_t i, int64_t) {
            if (i >= packs) return means.template compute<element>(plan, (i - packs) / plan.n, (i - packs) % plan.n);
            key.pack(plan, a.key, a.key_at, i / key.panels, i % key.panels);
            value.pack(plan, a.value, a.value_at, i / key.panels, i % key.panels);
        });
        parallel(a.threads, plan.BH * chunks, [&](int64_t i, int64_t thread) {
            int64_t chunk = chunks - 1 - i / plan.BH;  // the longest first
            unit(threads[thread], i % plan.BH, chunk * queries, std::min(a.Nq, (chunk + 1) * queries));
        });
        return bytes;
    }
};
