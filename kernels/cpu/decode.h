// A few queries: no copy of all keys and values is packed. Each selected block is read once for all
// the rows that selected it, 64 keys at a time, which stay in the core's cache. Each (row, block)
// leaves a partial softmax (m, l, O); a row's partials are merged in ascending order of block.
#pragma once
#include "forward.h"

constexpr int64_t FEW = 32;  // rows per kv head up to which this path is taken

template <class T>
struct Decode {
    const Plan& plan;
    const Arguments& a;
    const Modifiers modifiers{a};
    Means means{};
    Bias bias{};
    int64_t query_padded = 0, value_padded = 0, slot_size = 0;
    static constexpr int64_t STEP = 64;  // keys of a tile

    struct Item {
        const Routes* routes;
        int64_t block;
        std::vector<std::pair<int32_t, int32_t>> rows;  // row, slot
    };

    // The place of a list's row r among all rows.
    int64_t place(const Routes& routes, int64_t r) const {
        return (routes.h * a.B * a.Nq + routes.list->query) * plan.G + r;
    }

    struct Thread {
        const T **key, **value;         // [2][STEP]: this tile and the next, which is on its way
        float *keys, *values, *scores;  // [D][STEP], [STEP][value_padded], [MR][STEP]
    };
    void take(Arena& arena, Thread& t) const {
        t.key = arena.take<const T*>(2 * STEP);
        t.value = arena.take<const T*>(2 * STEP);
        t.keys = arena.take<float>(STEP * a.D);
        t.values = arena.take<float>(STEP * value_padded);
        t.scores = arena.take<float>(MR * STEP);
    }

    // Finds and fetches a list's keys first..last, one tile at most.
    void find(const List& x, int64_t h, int64_t first, int64_t last, const T** key,
              const T** value) const {
        for (int64_t r = first; r < std::min(last, first + STEP); ++r) {
            int64_t token = plan.key_index(x, r);
            key[r - first] = row_of((const T*)a.key, a.key_at, x.b, h, token);
            value[r - first] = row_of((const T*)a.value, a.value_at, x.b, h, token);
            prefetch(key[r - first], a.D);
            prefetch(value[r - first], a.Dv);
        }
    }

    void score_and_sum(Thread& t, const Item& item, const float* query, float* partial) const {
        const Routes& routes = *item.routes;
        const List& x = *routes.list;
        int64_t h = routes.h, first = item.block * x.block,
                last = std::min<int64_t>(first + x.block, x.real), count = item.rows.size();
        auto end = [&](int64_t i) {
            return std::min<int64_t>(last, routes.position[item.rows[i].first] + 1);
        };
        auto slot = [&](int64_t i) {
            auto [r, at] = item.rows[i];
            return partial + (place(routes, r) * plan.topk + at) * slot_size;
        };
        for (int64_t i = 0; i < count; ++i) {
            std::fill(slot(i), slot(i) + slot_size, 0.0f);
            slot(i)[0] = -INFINITY;
        }
        int64_t most = end(count - 1);  // rows ascend, and so does what they see
        find(x, h, first, most, t.key, t.value);
        for (int64_t s = first, now = 0; s < most; s += STEP, now = STEP - now) {
            int64_t n = std::min(STEP, most - s), columns = round_up(n, VL);
            transpose(t.key + now, n, a.D, STEP, t.keys);
            for (int64_t c = 0; c < n; ++c)
                widen_row(t.value[now + c], a.Dv, value_padded, t.values + c * value_padded);
            find(x, h, s + STEP, most, t.key + STEP - now, t.value + STEP - now);
            for (int64_t g = 0; g < count; g += MR) {
                int m = (int)std::min<int64_t>(MR, count - g);
                Rows<float> rows;
                float *p[MR], *top[MR], *total[MR], *out[MR], factor[MR];
                int64_t hi[MR];
                for (int i = 0; i < m; ++i) {
                    float* o = slot(g + i);
                    rows.row[i] = query + place(routes, item.rows[g + i].first) * query_padded;
                    p[i] = t.scores + i * STEP;
                    top[i] = o, total[i] = o + 1, out[i] = o + 2;
                    hi[i] = std::min(n, end(g + i) - s);
                }
                for (int64_t c = 0; c < columns; c += NR)
                    multiply<Float32, Rows<float>, SET>(
                        m, (int)std::min<int64_t>(NV, (columns - c) / VL), rows, t.keys + c, STEP,
                        a.D, p, c, modifiers.alpha);
                for (int i = 0; i < m; ++i) {
                    int64_t r = item.rows[g + i].first;
                    modifiers.apply(p[i], bias.of(x, routes.head(plan, r), s), routes.shift_of(r),
                                    columns);
                }
                softmax(m, p, p, 0, hi, columns, top, total, factor);
                for (int i = 0; i < m; ++i) {
                    if (factor[i] != 1.0f)
                        for (int64_t d = 0; d < value_padded; d += VL)
                            store(out[i] + d, load(out[i] + d) * factor[i]);
                    rows.row[i] = p[i];
                }
                for (int64_t d = 0; d < value_padded; d += NR)
                    multiply<Float32, Rows<float>, ADD>(
                        m, (int)std::min<int64_t>(NV, (value_padded - d) / VL), rows, t.values + d,
                        value_padded, n, out, d);
            }
        }
    }

    void merge(const Routes& routes, int64_t r, const float* partial, float* total) {
        int64_t b = routes.list->b, h = routes.head(plan, r), i = routes.token(plan, r);
        int32_t count = routes.count[r];
        const float* slots = partial + place(routes, r) * plan.topk * slot_size;
        float m = -INFINITY, l = 0.0f;
        for (int32_t s = 0; s < count; ++s) m = std::max(m, slots[s * slot_size]);
        float base = m == -INFINITY ? 0.0f : m;
        std::fill(total, total + value_padded, 0.0f);
        for (int32_t s = 0; s < count; ++s) {
            const float* slot = slots + s * slot_size;
            float weight = exp2_(splat(slot[0] - base))[0];
            l += slot[1] * weight;
            for (int64_t d = 0; d < value_padded; d += VL)
                store(total + d, mul_add(splat(weight), load(slot + 2 + d), load(total + d)));
        }
        T* out = row_of((T*)a.out, a.out_at, b, h, i);
        float inverse = count ? 1.0f / l : 0.0f;
        for (int64_t d = 0; d < a.Dv; ++d) from_float(total[d] * inverse, out + d);
        a.lse[(b * a.Hq + h) * a.Nq + i] =
            count ? Modifiers::lse(m, l, routes.shift_of(r)) : -INFINITY;
    }

    int64_t run() {
        int64_t all_rows = a.Hkv * a.B * a.Nq * plan.G;
        query_padded = round_up(a.D, VL);
        value_padded = round_up(a.Dv, VL);
        slot_size = 2 + value_padded;
        int64_t most;
        std::vector<Unit> units = units_of(plan, [&](const List&) { return a.Nq; }, &most);
        std::vector<Routes> routes(a.Hkv * units.size());
        std::vector<Thread> threads(a.threads);
        float *query, *partial, *total;
        auto all = [&](Arena& arena) {
            bias.take(arena, plan);
            means.take(arena, plan, bias);
            for (size_t i = 0; i < routes.size(); ++i)
                routes[i].take(arena, plan, units[i / a.Hkv].to * plan.G);
            query = arena.take<float>(all_rows * query_padded);
            partial = arena.take<float>(all_rows * plan.topk * slot_size);
            total = arena.take<float>(a.threads * value_padded);
            for (Thread& t : threads) take(arena, t);
        };
        Arena count{nullptr};
        all(count);
        Scratch scratch(count.used);
        if (!scratch.base) return FAILED;
        Arena arena{scratch.base};
        all(arena);

        prepare<T>(plan, bias, means, false, [](const List&, int64_t, int64_t) {});
        parallel(a.threads, routes.size(), [&](int64_t i, int64_t) {
            Routes& x = routes[i];
            const Unit& unit = units[i / a.Hkv];
            x.template run<T>(plan, means, *unit.list, i % a.Hkv, 0, unit.to);
            for (int64_t r = 0; r < x.total; ++r)
                widen_row((const T*)a.query + x.query_at[r], a.D, query_padded,
                          query + place(x, r) * query_padded);
        });
        std::vector<Item> items;
        std::vector<std::pair<const Routes*, int32_t>> rows;
        for (const Routes& x : routes) {
            std::vector<int32_t> used(x.total, 0);
            for (int64_t r = 0; r < x.total; ++r) rows.push_back({&x, (int32_t)r});
            for (int64_t j = 0; j < x.blocks; ++j) {
                int64_t size;
                const int32_t* id = x.of(j, x.list->dense ? j * x.list->block : 0, &size);
                if (!size) continue;
                items.push_back({&x, j, {}});
                for (int64_t i = 0; i < size; ++i)
                    items.back().rows.push_back({id[i], used[id[i]]++});
            }
        }
        parallel(a.threads, items.size(), [&](int64_t i, int64_t thread) {
            score_and_sum(threads[thread], items[i], query, partial);
        });
        parallel(a.threads, rows.size(), [&](int64_t i, int64_t thread) {
            merge(*rows[i].first, rows[i].second, partial, total + thread * value_padded);
        });
        return count.used;
    }
};
