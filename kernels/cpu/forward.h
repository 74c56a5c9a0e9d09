// Forward over units: a unit routes its rows, then meets each KV block once, in ascending order.
//
// Six rows at a time stay in registers and L1: S = Q K^T for a key tile, P = exp(S - m), O += P V;
// only O, m and l live on in the unit's scratch. A key tile (packed K^T and V) stays in L2 while
// all the rows of the unit pass over it.
#pragma once
#include "scores.h"
#include "units.h"

template <class E>
struct Forward {
    typedef typename E::word word;
    typedef typename E::element element;
    const Plan& plan;
    const Arguments& a;
    const Modifiers modifiers{a};
    Means means{};
    Bias bias{};
    Packed<E> key{}, value{};

    struct Thread {
        Routes routes;
        float *out, *m, *l, *scores;
        element* probabilities;
        word* query;
    };
    void take(Arena& arena) {
        bias.take(arena, plan);
        means.take(arena, plan, bias);
        key.take(arena, plan, a.D, true, false);
        value.take(arena, plan, a.Dv, false, true);
    }
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
        const List& x = *routes.list;
        int64_t h = routes.h, w = words<E>(a.D);
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
        for (int64_t j = 0; j < columns; j += NR)
            multiply<E, Rows<word>, SET>(m, (int)std::min<int64_t>(NV, (columns - j) / VL), rows,
                                         key.panel(x, h, tile + j), x.width(tile + j), w, c, j,
                                         modifiers.alpha);
        if (modifiers.cap > 0 || bias.heads)
            for (int i = 0; i < m; ++i)
                modifiers.apply(c[i], bias.of(x, routes.head(plan, id[i]), tile),
                                routes.shift_of(id[i]), columns);
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
        const word* v = value.from(x, h, tile) + from * value.padded;
        for (int64_t d = 0; d < value.padded; d += NR)
            multiply<E, Rows<word>, ADD>(m, (int)std::min<int64_t>(NV, (value.padded - d) / VL),
                                         rows, v + d, value.padded, words<E>(most) - from, c, d);
    }

    void unit(Thread& t, const Unit& unit, int64_t kv_head) {
        Routes& routes = t.routes;
        const List& x = *unit.list;
        routes.template run<element>(plan, means, x, kv_head, unit.from, unit.to);
        std::fill(t.m, t.m + routes.total, -INFINITY);
        std::fill(t.l, t.l + routes.total, 0.0f);
        std::memset(t.out, 0, routes.total * value.padded * sizeof(float));
        for (int64_t j = 0; j < routes.blocks; ++j) {
            int64_t first = j * x.block, last = std::min<int64_t>(first + x.block, x.real);
            for (int64_t tile = first / NR * NR; tile < last; tile += KEYS) {
                int64_t size;
                const int32_t* id = routes.of(j, std::max(first, tile), &size);
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
            element* out = row_of((element*)a.out, a.out_at, x.b, h, i);
            for (int64_t d = 0; d < a.Dv; ++d) from_float(o[d] * inverse, out + d);
            a.lse[(x.b * a.Hq + h) * a.Nq + i] =
                seen ? Modifiers::lse(t.m[r], t.l[r], routes.shift_of(r)) : -INFINITY;
        }
    }

    int64_t run() {
        int64_t share = ceil_div(a.B * a.Nq * a.Hkv, 4 * a.threads), most;
        auto queries = [&](const List& x) { return queries_per_unit(plan, x, share); };
        std::vector<Unit> units = units_of(plan, queries, &most);
        // The longest first. A query of a list meets at most the keys before it, and topk blocks.
        auto work = [&](const Unit& u) {
            int64_t keys = a.causal ? u.to : u.list->real;
            return (u.to - u.from) * std::min(keys, u.list->topk * u.list->block);
        };
        std::stable_sort(units.begin(), units.end(),
                         [&](const Unit& u, const Unit& v) { return work(u) > work(v); });
        return run_units<element>(*this, units, most);
    }
};
