// Backward over the units of the forward: P = exp(S - lse), dP = dO V^T, dS = P (dP - delta) scale
// with delta = sum(dO * O) - dlse; dQ += dS K stays in the unit, dK += dS^T Q and dV += P^T dO in a
// tile of keys.
//
// A finished tile is added to the shared gradient when it is this chunk of queries' turn, so each
// key's sum always has the same order: the result repeats bit for bit and does not depend on the
// number of threads.
#pragma once
#include <thread>

#include "cpu_forward.h"

template <class E>
struct Backward {
    typedef typename E::word word;
    typedef typename E::element element;
    static constexpr bool packed = E::per_word == 2;
    static constexpr int64_t ROWS = 96;  // rows of a tile: the depth of dK += dS^T Q
    const Plan& plan;
    const Arguments& a;
    Means means{};
    Packed<E> key{}, value{};
    int64_t keys = KEYS, line = LINE, queries = 0, tiles_per_block = 0;
    std::vector<std::atomic<int32_t>> turn{};

    struct Thread {
        Routes routes;
        float *lse, *delta, *grad_query, *grad_key, *grad_value;
        float *scores, *slopes;              // [MR or ROWS][line]: S then P, dP then dS
        element* slopes16;                   // [MR][line]: dS as the A operand of dQ
        word *p_across, *ds_across;          // [ROWS / 2][line]: P and dS by pairs of rows
        word *query, *grad_out;              // [MR][words]: A operands
        word *query_along, *grad_out_along;  // [ROWS / per_word][padded]: B operands
    };
    void take(Arena& arena, Thread& t, int64_t rows) {
        t.routes.take(arena, plan, rows);
        t.lse = arena.take<float>(rows);
        t.delta = arena.take<float>(rows);
        t.grad_query = arena.take<float>(rows * key.padded);
        t.grad_key = arena.take<float>(line * key.padded);
        t.grad_value = arena.take<float>(line * value.padded);
        t.scores = arena.take<float>((packed ? MR : ROWS) * line);
        t.slopes = arena.take<float>((packed ? MR : ROWS) * line);
        if (packed) {
            t.slopes16 = arena.take<element>(MR * line);
            t.p_across = arena.take<word>(ROWS / 2 * line);
            t.ds_across = arena.take<word>(ROWS / 2 * line);
        }
        t.query = arena.take<word>(MR * words<E>(a.D));
        t.grad_out = arena.take<word>(MR * words<E>(a.Dv));
        t.query_along = arena.take<word>(ROWS / E::per_word * key.padded);
        t.grad_out_along = arena.take<word>(ROWS / E::per_word * value.padded);
    }
    const element* query_row(const Routes& x, int64_t r) const {
        return row_of((const element*)a.query, a.query_at, x.bh / a.Hkv, x.head(plan, r),
                      x.token(plan, r));
    }
    const element* grad_row(const Routes& x, int64_t r) const {
        return row_of((const element*)a.grad_out, a.grad_out_at, x.bh / a.Hkv, x.head(plan, r),
                      x.token(plan, r));
    }

    // P and dS of one vector of one row, zero outside lo..hi.
    static inline void slope(vf s, vf g, float lse, float delta, float scale, vf* p, vf* ds) {
        *p = exp2_(s - lse);
        *ds = *p * (g - delta) * scale;
    }

    // At most ROWS rows against one tile of keys.
    void rows_by_tile(Thread& t, const int32_t* id, int64_t size, int64_t tile, int64_t first,
                      int64_t last) {
        const Routes& routes = t.routes;
        int64_t bh = routes.bh, w = words<E>(a.D), wv = words<E>(a.Dv);
        int64_t lo = std::max<int64_t>(first - tile, 0), end = std::min(last - tile, keys),
                hi[ROWS] = {};
        float scale = (float)a.scale;
        for (int64_t i = 0; i < size; ++i)
            hi[i] = std::min<int64_t>(end, routes.position[id[i]] + 1 - tile);
        int64_t all = hi[size - 1], all_columns = round_up(all, VL);
        for (int64_t i = 0; i < size; i += E::per_word) {
            const element *q[2] = {}, *g[2] = {};
            for (int64_t r = i; r < std::min<int64_t>(size, i + E::per_word); ++r) {
                q[r - i] = query_row(routes, id[r]);
                g[r - i] = grad_row(routes, id[r]);
            }
            interleave<E>(q, a.D, key.padded, t.query_along + i / E::per_word * key.padded);
            interleave<E>(g, a.Dv, value.padded, t.grad_out_along + i / E::per_word * value.padded);
        }
        for (int64_t i = 0; i < size; i += MR) {
            int m = (int)std::min<int64_t>(MR, size - i);
            int64_t most = hi[i + m - 1], columns = round_up(most, VL);
            Rows<word> q, g;
            float *s[MR], *ds[MR];
            for (int r = 0; r < m; ++r) {
                if (packed) {
                    copy_words<E>(query_row(routes, id[i + r]), a.D, t.query + r * w);
                    copy_words<E>(grad_row(routes, id[i + r]), a.Dv, t.grad_out + r * wv);
                }
                q.row[r] = packed ? t.query + r * w : t.query_along + (i + r) * key.padded;
                g.row[r] = packed ? t.grad_out + r * wv : t.grad_out_along + (i + r) * value.padded;
                s[r] = t.scores + (packed ? r : i + r) * line;
                ds[r] = t.slopes + (packed ? r : i + r) * line;
            }
            for (int64_t p = 0; p < columns; p += NR) {
                int v = (int)std::min<int64_t>(NV, (columns - p) / VL);
                multiply<E, Rows<word>, SET>(m, v, q, key.panel(bh, (tile + p) / NR), NR, w, s, p,
                                             scale * LOG2E);
                multiply<E, Rows<word>, SET>(m, v, g, value.panel(bh, (tile + p) / NR), NR, wv, ds,
                                             p);
            }
            Rows<word> x;
            float* dq[MR];
            int64_t from = lo / E::per_word;
            for (int r = 0; r < m; ++r) {
                int64_t row = id[i + r];
                bool inside = lo == 0 && hi[i + r] >= columns;
                for (int64_t c = 0; c < columns; c += VL) {
                    vf p, d;
                    slope(load(s[r] + c), load(ds[r] + c), t.lse[row], t.delta[row], scale, &p, &d);
                    if (!inside) {
                        p = keep(p, c, lo, hi[i + r], 0.0f);
                        d = keep(d, c, lo, hi[i + r], 0.0f);
                    }
                    store(s[r] + c, p);
                    store(ds[r] + c, d);
                    if (packed) round_to(d, t.slopes16 + r * line + c);
                }
                for (int64_t c = columns; c < all_columns; c += VL) {
                    store(s[r] + c, vf{});
                    store(ds[r] + c, vf{});
                }
                x.row[r] = (packed ? (word*)(t.slopes16 + r * line) : (word*)ds[r]) + from;
                dq[r] = t.grad_query + row * key.padded;
            }
            if constexpr (packed)
                for (int r = 0; r < m; r += 2) {
                    word *p = t.p_across + (i + r) / 2 * line,
                         *d = t.ds_across + (i + r) / 2 * line;
                    for (int64_t c = 0; c < all_columns; c += VL) {
                        vf zero = vf{};
                        pair(load(s[r] + c), r + 1 < m ? load(s[r + 1] + c) : zero, p + c);
                        pair(load(ds[r] + c), r + 1 < m ? load(ds[r + 1] + c) : zero, d + c);
                    }
                }
            const word* k = key.from(bh, tile) + from * key.padded;
            for (int64_t d = 0; d < key.padded; d += NR)
                multiply<E, Rows<word>, ADD>(m, (int)std::min<int64_t>(NV, (key.padded - d) / VL),
                                             x, k + d, key.padded, words<E>(most) - from, dq, d);
        }
        const word* p = packed ? t.p_across : (word*)t.scores;
        const word* ds = packed ? t.ds_across : (word*)t.slopes;
        by_keys(p, t.grad_out_along, value.padded, t.grad_value, lo, all, hi, size);
        by_keys(ds, t.query_along, key.padded, t.grad_key, lo, all, hi, size);
    }

    // out[key] += sum over rows of x[row][key] * y[row], for keys lo..all; a key is seen by the
    // rows with hi > key.
    void by_keys(const word* x, const word* y, int64_t padded, float* out, int64_t lo, int64_t all,
                 const int64_t* hi, int64_t size) {
        for (int64_t d = 0; d < padded; d += NR) {
            int v = (int)std::min<int64_t>(NV, (padded - d) / VL);
            int64_t skip = 0;
            for (int64_t c = lo; c < all; c += MR) {
                int m = (int)std::min<int64_t>(MR, all - c);
                while (hi[skip] <= c) ++skip;
                int64_t from = skip / E::per_word;
                Columns<word> columns{x + from * line + c, line};
                float* o[MR];
                for (int i = 0; i < m; ++i) o[i] = out + (c + i) * padded;
                multiply<E, Columns<word>, ADD>(m, v, columns, y + from * padded + d, padded,
                                                words<E>(size) - from, o, d);
            }
        }
    }

#ifdef MOONFX_BF16
    static inline void pair(vf even, vf odd, uint32_t* out) {
        const __m512i order =
            _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                             22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(
                                                                     (__m512)odd, (__m512)even)));
    }
#endif

    int64_t last_position(int64_t b, int64_t chunk) const {
        return plan.position[b * a.Nq + std::min(a.Nq, (chunk + 1) * queries) - 1];
    }

    void unit(Thread& t, int64_t bh, int64_t chunk) {
        Routes& routes = t.routes;
        int64_t b = bh / a.Hkv, h = bh % a.Hkv, from = chunk * queries,
                to = std::min(a.Nq, from + queries);
        routes.template run<element>(plan, means, bh, from, to);
        std::memset(t.grad_query, 0, routes.total * key.padded * sizeof(float));
        for (int64_t r = 0; r < routes.total; ++r) {
            int64_t hq = routes.head(plan, r), i = routes.token(plan, r),
                    at = (b * a.Hq + hq) * a.Nq + i;
            const element *g = grad_row(routes, r),
                          *o = row_of((const element*)a.out, a.out_at, b, hq, i);
            t.lse[r] = a.lse[at] * LOG2E;
            vf delta = vf{};
            int64_t d = 0;
            for (; d + VL <= a.Dv; d += VL) delta = mul_add(widen(g + d), widen(o + d), delta);
            float rest = sum(delta);
            for (; d < a.Dv; ++d) rest += to_float(g[d]) * to_float(o[d]);
            t.delta[r] = rest - (a.grad_lse ? a.grad_lse[at] : 0.0f);
        }
        int64_t before = chunk ? last_position(b, chunk - 1) : -1, reach = last_position(b, chunk);
        for (int64_t j = 0; j < routes.blocks; ++j) {
            int64_t first = j * plan.block,
                    last = std::min<int64_t>(first + plan.block, plan.real[b]), number = 0;
            for (int64_t tile = first / NR * NR; tile < last; tile += keys, ++number) {
                int64_t lo = std::max(first, tile),
                        hi = std::min(std::min(last, tile + keys), reach + 1), size;
                if (lo > reach) break;
                const int32_t* id = routes.of(plan, j, lo, &size);
                if (size) {
                    std::memset(t.grad_key + (lo - tile) * key.padded, 0,
                                (hi - lo) * key.padded * sizeof(float));
                    std::memset(t.grad_value + (lo - tile) * value.padded, 0,
                                (hi - lo) * value.padded * sizeof(float));
                }
                for (int64_t i = 0; i < size; i += ROWS)
                    rows_by_tile(t, id + i, std::min(ROWS, size - i), tile, first, last);
                std::atomic<int32_t>& mine = turn[(bh * plan.n + j) * tiles_per_block + number];
                if (lo <= before)
                    while (mine.load(std::memory_order_acquire) != chunk) std::this_thread::yield();
                for (int64_t r = lo; size && r < hi; ++r) {
                    int64_t token = plan.key_index(b, r);
                    add(row_of(a.grad_key, a.grad_key_at, b, h, token),
                        t.grad_key + (r - tile) * key.padded, a.D);
                    add(row_of(a.grad_value, a.grad_value_at, b, h, token),
                        t.grad_value + (r - tile) * value.padded, a.Dv);
                }
                mine.store((int32_t)chunk + 1, std::memory_order_release);
            }
        }
        for (int64_t r = 0; r < routes.total; ++r) {
            const float* g = t.grad_query + r * key.padded;
            element* out = row_of((element*)a.grad_query, a.grad_query_at, b, routes.head(plan, r),
                                  routes.token(plan, r));
            for (int64_t d = 0; d < a.D; ++d) from_float(g[d], out + d);
        }
    }
    static void add(float* out, const float* x, int64_t d) {
        int64_t i = 0;
        for (; i + VL <= d; i += VL) store(out + i, load(out + i) + load(x + i));
        for (; i < d; ++i) out[i] += x[i];
    }

    int64_t run() {
        keys = std::max(a.D, a.Dv) > 96 ? KEYS / 2 : KEYS;
        line = keys + VL;
        queries = queries_per_unit(plan, 64);  // never by the number of threads: it orders the sums
        tiles_per_block = ceil_div(plan.block + NR - 1, keys);
        int64_t chunks = ceil_div(a.Nq, queries);
        turn = std::vector<std::atomic<int32_t>>(plan.BH * plan.n * tiles_per_block);
        auto shared = [&](Arena& arena) {
            means.take(arena, plan);
            key.take(arena, plan, a.D, true, true);
            value.take(arena, plan, a.Dv, true, false);
        };
        Arena count{nullptr};
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
        // Chunk by chunk, so that a unit only ever waits for units that have started.
        parallel(a.threads, plan.BH * chunks, [&](int64_t i, int64_t thread) {
            unit(threads[thread], i % plan.BH, i / plan.BH);
        });
        return bytes;
    }
};
