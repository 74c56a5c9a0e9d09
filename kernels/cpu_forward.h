// Forward over units: a unit routes its rows, then meets each KV block once, in ascending order.
//
// Six rows at a time stay in registers and L1: S = Q K^T for a key tile, P = exp(S - m), O += P V;
// only O, m and l live on in the unit's scratch. A key tile (packed K^T and V) stays in L2 while
// all the rows of the unit pass over it.
#pragma once
#include "cpu_route.h"

constexpr int64_t KEYS = 512;        // keys of a tile: with 128 channels, K^T and V take 512 KiB
constexpr int64_t LINE = KEYS + VL;  // leading dimension of a tile of scores

// Zero (or -inf) outside columns lo..hi.
static inline vf keep(vf x, int64_t column, int64_t lo, int64_t hi, float other) {
    vi c = iota() + (int32_t)column;
    return (c >= (int32_t)lo) & (c < (int32_t)hi) ? x : splat(other);
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

    // Rows `id` (at most MR, ascending positions) against keys rank tile..; the block is keys
    // first..last.
    void group(Thread& t, const int32_t* id, int m, int64_t tile, int64_t first, int64_t last) {
        const Routes& routes = t.routes;
        int64_t bh = routes.bh, w = words<E>(a.D);
        int64_t lo = std::max<int64_t>(first - tile, 0), hi[MR];
        Rows<word> rows;
        float *c[MR], *top[MR], *total[MR], factor[MR];
        element* p[MR];
        for (int i = 0; i < m; ++i) {
            int64_t r = id[i];
            hi[i] = std::min<int64_t>(std::min<int64_t>(last, routes.position[r] + 1) - tile, KEYS);
            copy_words<E>((const element*)a.query + routes.query_at[r], a.D, t.query + i * w);
            p[i] = t.probabilities + i * LINE;
            top[i] = t.m + r;
            total[i] = t.l + r;
            rows.row[i] = t.query + i * w;
            c[i] = t.scores + i * LINE;
        }
        int64_t most = hi[m - 1], columns = round_up(most, VL);
        float scale = (float)a.scale * LOG2E;
        for (int64_t j = 0; j < columns; j += NR)
            multiply<E, Rows<word>, SET>(m, (int)std::min<int64_t>(NV, (columns - j) / VL), rows,
                                         key.panel(bh, (tile + j) / NR), NR, w, c, j, scale);
        softmax(m, c, p, lo, hi, columns, top, total, factor);
        int64_t from = lo / E::per_word;
        for (int i = 0; i < m; ++i) {
            float* out = t.out + id[i] * value.padded;
            if (factor[i] != 1.0f)
                for (int64_t d = 0; d < value.padded; d += VL)
                    store(out + d, load(out + d) * factor[i]);
            rows.row[i] = (const word*)p[i] + from;
            c[i] = out;
        }
        const word* v = value.from(bh, tile) + from * value.padded;
        for (int64_t d = 0; d < value.padded; d += NR)
            multiply<E, Rows<word>, ADD>(m, (int)std::min<int64_t>(NV, (value.padded - d) / VL),
                                         rows, v + d, value.padded, words<E>(most) - from, c, d);
    }

    void unit(Thread& t, int64_t bh, int64_t from, int64_t to) {
        Routes& routes = t.routes;
        int64_t b = bh / a.Hkv;
        routes.template run<element>(plan, means, bh, from, to);
        std::fill(t.m, t.m + routes.total, -INFINITY);
        std::fill(t.l, t.l + routes.total, 0.0f);
        std::memset(t.out, 0, routes.total * value.padded * sizeof(float));
        for (int64_t j = 0; j < routes.blocks; ++j) {
            int64_t first = j * plan.block,
                    last = std::min<int64_t>(first + plan.block, plan.real[b]);
            for (int64_t tile = first / NR * NR; tile < last; tile += KEYS) {
                int64_t size;
                const int32_t* id = routes.of(plan, j, std::max(first, tile), &size);
                if (!size) break;
                for (int64_t g = 0; g < size; g += MR) {
                    for (int64_t i = g + MR; i < std::min<int64_t>(size, g + 2 * MR); ++i) {
                        prefetch((const element*)a.query + routes.query_at[id[i]], a.D);
                        prefetch(t.out + id[i] * value.padded, value.padded);
                    }
                    group(t, id + g, (int)std::min<int64_t>(MR, size - g), tile, first,
                          std::min(last, tile + KEYS));
                }
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
            if (i >= packs)
                return means.template compute<element>(plan, (i - packs) / plan.n,
                                                       (i - packs) % plan.n);
            key.pack(plan, a.key, a.key_at, i / key.panels, i % key.panels);
            value.pack(plan, a.value, a.value_at, i / key.panels, i % key.panels);
        });
        parallel(a.threads, plan.BH * chunks, [&](int64_t i, int64_t thread) {
            int64_t chunk = chunks - 1 - i / plan.BH;  // the longest first
            unit(threads[thread], i % plan.BH, chunk * queries,
                 std::min(a.Nq, (chunk + 1) * queries));
        });
        return bytes;
    }
};
