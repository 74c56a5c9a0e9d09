// Backward over the units of the forward, tile by tile (backward_tile.h); delta = sum(dO * O) - dlse.
//
// A finished tile is added to the shared gradient when it is this chunk of queries' turn, so each
// key's sum always has the same order: the result repeats bit for bit and does not depend on the
// number of threads.
#pragma once
#include <thread>

#include "backward_tile.h"

template <class E>
struct Backward : Tiles<E> {
    using typename Tiles<E>::element;
    using typename Tiles<E>::Thread;
    using Tiles<E>::plan, Tiles<E>::a, Tiles<E>::bias, Tiles<E>::key;
    using Tiles<E>::value, Tiles<E>::keys, Tiles<E>::line, Tiles<E>::ROWS;
    using Tiles<E>::grad_row, Tiles<E>::take, Tiles<E>::rows_by_tile;
    Means means{};
    std::vector<int64_t> turns{};  // [lists]: where a list's turns begin
    std::vector<std::atomic<int32_t>> turn{};

    explicit Backward(const Plan& all) : Tiles<E>{all, all.a} {}

    // How often a tile was added to: [block][tile].
    std::atomic<int32_t>* turns_of(const List& x, int64_t h) {
        return &turn[turns[&x - plan.lists.data()] + h * x.n * tiles_per_block(x)];
    }
    int64_t tiles_per_block(const List& x) const { return ceil_div(x.block + NR - 1, keys); }

    void take(Arena& arena) {
        bias.take(arena, plan);
        means.take(arena, plan, bias);
        key.take(arena, plan, a.D, true, true);
        value.take(arena, plan, a.Dv, true, false);
    }

    void unit(Thread& t, const Unit& unit, int64_t h) {
        Routes& routes = t.routes;
        const List& x = *unit.list;
        int64_t b = x.b, chunk = unit.chunk;
        routes.template run<element>(plan, means, x, h, unit.from, unit.to);
        std::memset(t.grad_query, 0, routes.total * key.padded * sizeof(float));
        for (int64_t r = 0; r < routes.total; ++r) {
            int64_t hq = routes.head(plan, r), i = routes.token(plan, r),
                    at = (b * a.Hq + hq) * a.Nq + i;
            const element *g = grad_row(routes, r),
                          *o = row_of((const element*)a.out, a.out_at, b, hq, i);
            t.lse[r] = Modifiers::lse2(a.lse[at], routes.shift_of(r));
            vf delta = vf{};
            int64_t d = 0;
            for (; d + VL <= a.Dv; d += VL) delta = mul_add(widen(g + d), widen(o + d), delta);
            float rest = sum(delta);
            for (; d < a.Dv; ++d) rest += to_float(g[d]) * to_float(o[d]);
            t.delta[r] = rest - (a.grad_lse ? a.grad_lse[at] : 0.0f);
        }
        int64_t before = chunk ? plan.reach(x, unit.from - 1) : -1,
                reach = plan.reach(x, unit.to - 1), tiles = tiles_per_block(x);
        std::atomic<int32_t>* mine = turns_of(x, h);
        for (int64_t j = 0; j < routes.blocks; ++j) {
            int64_t first = j * x.block, last = std::min<int64_t>(first + x.block, x.real),
                    number = 0;
            for (int64_t tile = first / NR * NR; tile < last; tile += keys, ++number) {
                int64_t lo = std::max(first, tile),
                        hi = std::min(std::min(last, tile + keys), reach + 1), size;
                if (lo > reach) break;
                const int32_t* id = routes.of(j, lo, &size);
                if (size) {
                    std::memset(t.grad_key + (lo - tile) * key.padded, 0,
                                (hi - lo) * key.padded * sizeof(float));
                    std::memset(t.grad_value + (lo - tile) * value.padded, 0,
                                (hi - lo) * value.padded * sizeof(float));
                    for (int64_t g = 0; bias.heads && g < plan.G; ++g)
                        std::memset(t.grad_bias + g * line, 0,
                                    round_up(hi - tile, VL) * sizeof(float));
                }
                for (int64_t i = 0; i < size; i += ROWS)
                    rows_by_tile(t, id + i, std::min(ROWS, size - i), tile, first, last);
                std::atomic<int32_t>& added = mine[j * tiles + number];
                if (lo <= before)
                    while (added.load(std::memory_order_acquire) != chunk)
                        std::this_thread::yield();
                for (int64_t r = lo; size && r < hi; ++r) {
                    int64_t token = plan.key_index(x, r);
                    add(row_of(a.grad_key, a.grad_key_at, b, h, token),
                        t.grad_key + (r - tile) * key.padded, a.D);
                    add(row_of(a.grad_value, a.grad_value_at, b, h, token),
                        t.grad_value + (r - tile) * value.padded, a.Dv);
                    for (int64_t g = 0; bias.heads && g < plan.G; ++g)
                        a.grad_bias[(b * a.Hq + h * plan.G + g) * a.Nk + token] +=
                            t.grad_bias[g * line + r - tile];
                }
                added.store((int32_t)chunk + 1, std::memory_order_release);
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
        // Never by the number of threads: it orders the sums. A packed sequence is cut as if alone.
        auto queries = [&](const List& x) {
            int64_t all = a.segments ? x.queries : a.B * a.Nq;
            return queries_per_unit(plan, x, ceil_div(all * a.Hkv, 64));
        };
        int64_t most, last = 0;
        std::vector<Unit> units = units_of(plan, queries, &most);
        for (const List& x : plan.lists) {
            turns.push_back(last);
            last += x.queries ? a.Hkv * x.n * tiles_per_block(x) : 0;
        }
        turn = std::vector<std::atomic<int32_t>>(last);
        // Chunk by chunk, so that a unit only ever waits for units that have started.
        return run_units<element>(*this, units, most);
    }
};
