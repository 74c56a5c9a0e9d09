// Backward of a tile: at most 96 rows against at most 512 keys.
//
// P = exp(S - lse), dP = dO V^T, dS = P (dP - delta), and the gradient of the bias sums dS over
// rows. dS times the softcap's slope 1 - tanh^2 and the scale is the products' gradient: dQ += dS K
// goes to the unit's sums, dK += dS^T Q and dV += P^T dO to the tile's.
#pragma once
#include "forward.h"

template <class E>
struct Tiles {
    typedef typename E::word word;
    typedef typename E::element element;
    static constexpr bool packed = E::per_word == 2;
    static constexpr int64_t ROWS = 96;  // rows of a tile: the depth of dK += dS^T Q
    const Plan& plan;
    const Arguments& a;
    const Modifiers modifiers{a};
    Bias bias{};
    Packed<E> key{}, value{};
    int64_t keys = KEYS, line = LINE;

    struct Thread {
        Routes routes;
        float *lse, *delta, *grad_query, *grad_key, *grad_value;
        float* grad_bias;                    // [G][line]
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
        if (bias.heads) t.grad_bias = arena.take<float>(plan.G * line);
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
        return (const element*)a.query + x.query_at[r];
    }
    const element* grad_row(const Routes& x, int64_t r) const {
        return row_of((const element*)a.grad_out, a.grad_out_at, x.list->b, x.head(plan, r),
                      x.token(plan, r));
    }

    // Scores and dP of one row become P and the products' gradient, zero outside lo..hi.
    template <bool CAP, bool BIAS>
    void slopes(float* s, float* g, element* g16, int64_t lo, int64_t hi, int64_t columns,
                float lse, float delta, const float* b, float shift, float* grad_bias) const {
        float scale = (float)a.scale;
        bool inside = lo == 0 && hi >= columns;
        for (int64_t c = 0; c < columns; c += VL) {
            vf x = load(s + c), bend = vf{};
            if (CAP) {
                bend = tanh_(x);
                x = bend * modifiers.cap;
            }
            if (BIAS) x = Modifiers::biased(x, b + c, shift);
            vf p = exp2_(x - lse), d = p * (load(g + c) - delta);
            if (BIAS)
                store(grad_bias + c,
                      load(grad_bias + c) + (inside ? d : keep(d, c, lo, hi, 0.0f)));
            if (CAP) d = d * (1.0f - bend * bend);
            d = d * scale;
            if (!inside) {
                p = keep(p, c, lo, hi, 0.0f);
                d = keep(d, c, lo, hi, 0.0f);
            }
            store(s + c, p);
            store(g + c, d);
            if (packed) round_to(d, g16 + c);
        }
    }

    // At most ROWS rows against one tile of keys.
    void rows_by_tile(Thread& t, const int32_t* id, int64_t size, int64_t tile, int64_t first,
                      int64_t last) {
        const Routes& routes = t.routes;
        const List& x = *routes.list;
        int64_t h = routes.h, w = words<E>(a.D), wv = words<E>(a.Dv);
        int64_t lo = std::max<int64_t>(first - tile, 0), end = std::min(last - tile, keys),
                hi[ROWS] = {};
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
                int64_t ldb = x.width(tile + p);
                multiply<E, Rows<word>, SET>(m, v, q, key.panel(x, h, tile + p), ldb, w, s, p,
                                             modifiers.alpha);
                multiply<E, Rows<word>, SET>(m, v, g, value.panel(x, h, tile + p), ldb, wv, ds, p);
            }
            Rows<word> slope;
            float* dq[MR];
            int64_t from = lo / E::per_word;
            for (int r = 0; r < m; ++r) {
                int64_t row = id[i + r];
                const float* b = bias.of(x, routes.head(plan, row), tile);
                float* grad_bias = b ? t.grad_bias + row % plan.G * line : nullptr;
                auto run = modifiers.cap > 0
                               ? b ? &Tiles::slopes<true, true> : &Tiles::slopes<true, false>
                           : b ? &Tiles::slopes<false, true> : &Tiles::slopes<false, false>;
                (this->*run)(s[r], ds[r], packed ? t.slopes16 + r * line : nullptr, lo, hi[i + r],
                             columns, t.lse[row], t.delta[row], b, routes.shift_of(row), grad_bias);
                for (int64_t c = columns; c < all_columns; c += VL) {
                    store(s[r] + c, vf{});
                    store(ds[r] + c, vf{});
                }
                slope.row[r] = (packed ? (word*)(t.slopes16 + r * line) : (word*)ds[r]) + from;
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
            const word* k = key.from(x, h, tile) + from * key.padded;
            for (int64_t d = 0; d < key.padded; d += NR)
                multiply<E, Rows<word>, ADD>(m, (int)std::min<int64_t>(NV, (key.padded - d) / VL),
                                             slope, k + d, key.padded, words<E>(most) - from, dq,
                                             d);
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
};
