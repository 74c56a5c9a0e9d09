// A few queries: keys and values are not packed, each selected block is read once for all the rows
// that selected it. Each (row, block) leaves a partial softmax (m, l, O); a row's partials are
// merged in ascending order of block.
#pragma once
#include "cpu_forward.h"

constexpr int64_t FEW = 32;  // rows per kv head up to which this path is taken

template <class T>
struct Decode {
    const Plan& plan;
    const Arguments& a;
    const Modifiers modifiers{a};
    Means means{};
    Bias bias{};
    int64_t query_padded = 0, value_padded = 0, slot_size = 0;
    static constexpr int64_t STEP = 64;  // keys scored before their values are read

    struct Item {
        const Routes* routes;
        int64_t block;
        std::vector<std::pair<int32_t, int32_t>> rows;  // row, slot
    };

    // The place of a list's row r among all rows.
    int64_t place(const Routes& routes, int64_t r) const {
        return (routes.h * a.B * a.Nq + routes.list->query) * plan.G + r;
    }

    void score_and_sum(const Item& item, const float* query, float* partial) {
        const Routes& routes = *item.routes;
        const List& x = *routes.list;
        int64_t h = routes.h, first = item.block * x.block,
                last = std::min<int64_t>(first + x.block, x.real);
        size_t count = item.rows.size();
        std::vector<float> buffer(count * STEP + query_padded + value_padded);
        float *scores = buffer.data(), *key = scores + count * STEP, *value = key + query_padded;
        int64_t most = 0;
        std::vector<int64_t> end(count);
        std::vector<float*> out(count);
        std::vector<const float*> q(count);
        for (size_t i = 0; i < count; ++i) {
            int64_t r = item.rows[i].first;
            end[i] = std::min<int64_t>(last, routes.position[r] + 1);
            most = std::max(most, end[i]);
            out[i] = partial + (place(routes, r) * plan.topk + item.rows[i].second) * slot_size;
            q[i] = query + place(routes, r) * query_padded;
            std::fill(out[i], out[i] + slot_size, 0.0f);
            out[i][0] = -INFINITY;
        }
        for (int64_t s = first; s < most; s += STEP) {
            int64_t n = std::min(STEP, most - s);
            for (int64_t c = 0; c < n; ++c) {
                const T* k = row_of((const T*)a.key, a.key_at, x.b, h, plan.key_index(x, s + c));
                widen_row(k, a.D, query_padded, key);
                for (size_t i = 0; i < count; ++i) {
                    vf dot = vf{};
                    for (int64_t d = 0; d < query_padded; d += VL)
                        dot = mul_add(load(q[i] + d), load(key + d), dot);
                    scores[i * STEP + c] = sum(dot) * modifiers.alpha;
                }
            }
            for (size_t i = 0; i < count; ++i) {
                if (end[i] <= s) {
                    std::fill(scores + i * STEP, scores + (i + 1) * STEP, 0.0f);
                    continue;
                }
                float *row = scores + i * STEP, *m = out[i], *l = out[i] + 1, factor;
                int64_t hi = std::min(n, end[i] - s);
                int64_t r = item.rows[i].first;
                modifiers.apply(row, bias.of(x, routes.head(plan, r), s), routes.shift_of(r),
                                round_up(n, VL));
                softmax(1, &row, &row, 0, &hi, round_up(n, VL), &m, &l, &factor);
                if (factor != 1.0f)
                    for (int64_t d = 0; d < value_padded; d += VL)
                        store(out[i] + 2 + d, load(out[i] + 2 + d) * factor);
            }
            for (int64_t c = 0; c < n; ++c) {
                int64_t token = plan.key_index(x, s + c);
                const T* v = row_of((const T*)a.value, a.value_at, x.b, h, token);
                widen_row(v, a.Dv, value_padded, value);
                for (size_t i = 0; i < count; ++i) {
                    float p = scores[i * STEP + c];
                    for (int64_t d = 0; d < value_padded; d += VL)
                        store(out[i] + 2 + d,
                              mul_add(splat(p), load(value + d), load(out[i] + 2 + d)));
                }
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
        float *query, *partial, *total;
        auto all = [&](Arena& arena) {
            bias.take(arena, plan);
            means.take(arena, plan, bias);
            for (size_t i = 0; i < routes.size(); ++i)
                routes[i].take(arena, plan, units[i / a.Hkv].to * plan.G);
            query = arena.take<float>(all_rows * query_padded);
            partial = arena.take<float>(all_rows * plan.topk * slot_size);
            total = arena.take<float>(a.threads * value_padded);
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
        parallel(a.threads, items.size(),
                 [&](int64_t i, int64_t) { score_and_sum(items[i], query, partial); });
        parallel(a.threads, rows.size(), [&](int64_t i, int64_t thread) {
            merge(*rows[i].first, rows[i].second, partial, total + thread * value_padded);
        });
        return count.used;
    }
};
