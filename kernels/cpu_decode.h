// A few queries: nothing is packed, each selected block is read once for all the rows that selected
// it. Each (row, block) leaves a partial softmax (m, l, O); a row's partials are merged in
// ascending order of block.
#pragma once
#include "cpu_forward.h"

constexpr int64_t FEW = 32;  // rows per kv head up to which this path is taken

template <class T>
struct Decode {
    const Plan& plan;
    const Arguments& a;
    Means means{};
    int64_t rows = 0, query_padded = 0, value_padded = 0, slot_size = 0;
    static constexpr int64_t STEP = 64;  // keys scored before their values are read

    struct Item {
        int64_t bh, block;
        std::vector<std::pair<int32_t, int32_t>> rows;  // row, slot
    };

    void score_and_sum(const Item& item, const float* query, float* partial) {
        int64_t b = item.bh / a.Hkv, h = item.bh % a.Hkv;
        int64_t first = item.block * plan.block,
                last = std::min<int64_t>(first + plan.block, plan.real[b]);
        size_t count = item.rows.size();
        std::vector<float> buffer(count * STEP + query_padded + value_padded);
        float *scores = buffer.data(), *key = scores + count * STEP, *value = key + query_padded;
        float scale = (float)a.scale * LOG2E;
        int64_t most = 0;
        std::vector<int64_t> end(count);
        std::vector<float*> out(count);
        std::vector<const float*> q(count);
        for (size_t x = 0; x < count; ++x) {
            int64_t r = item.rows[x].first;
            end[x] = std::min<int64_t>(last, plan.position[b * a.Nq + r / plan.G] + 1);
            most = std::max(most, end[x]);
            out[x] = partial + ((item.bh * rows + r) * plan.topk + item.rows[x].second) * slot_size;
            q[x] = query + (item.bh * rows + r) * query_padded;
            std::fill(out[x], out[x] + slot_size, 0.0f);
            out[x][0] = -INFINITY;
        }
        for (int64_t s = first; s < most; s += STEP) {
            int64_t n = std::min(STEP, most - s);
            for (int64_t c = 0; c < n; ++c) {
                const T* k = row_of((const T*)a.key, a.key_at, b, h, plan.key_index(b, s + c));
                widen_row(k, a.D, query_padded, key);
                for (size_t x = 0; x < count; ++x) {
                    vf dot = vf{};
                    for (int64_t d = 0; d < query_padded; d += VL)
                        dot = mul_add(load(q[x] + d), load(key + d), dot);
                    scores[x * STEP + c] = sum(dot) * scale;
                }
            }
            for (size_t x = 0; x < count; ++x) {
                if (end[x] <= s) {
                    std::fill(scores + x * STEP, scores + (x + 1) * STEP, 0.0f);
                    continue;
                }
                float *row = scores + x * STEP, *m = out[x], *l = out[x] + 1, factor;
                int64_t hi = std::min(n, end[x] - s);
                softmax(1, &row, &row, 0, &hi, round_up(n, VL), &m, &l, &factor);
                if (factor != 1.0f)
                    for (int64_t d = 0; d < value_padded; d += VL)
                        store(out[x] + 2 + d, load(out[x] + 2 + d) * factor);
            }
            for (int64_t c = 0; c < n; ++c) {
                const T* v = row_of((const T*)a.value, a.value_at, b, h, plan.key_index(b, s + c));
                widen_row(v, a.Dv, value_padded, value);
                for (size_t x = 0; x < count; ++x) {
                    float p = scores[x * STEP + c];
                    for (int64_t d = 0; d < value_padded; d += VL)
                        store(out[x] + 2 + d,
                              mul_add(splat(p), load(value + d), load(out[x] + 2 + d)));
                }
            }
        }
    }

    void merge(int64_t bh, int64_t r, int32_t count, const float* partial, float* total) {
        int64_t b = bh / a.Hkv, h = bh % a.Hkv * plan.G + r % plan.G, i = r / plan.G;
        const float* slots = partial + (bh * rows + r) * plan.topk * slot_size;
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
        a.lse[(b * a.Hq + h) * a.Nq + i] = count ? m * LN2 + std::log(l) : -INFINITY;
    }

    int64_t run() {
        rows = a.Nq * plan.G;
        query_padded = round_up(a.D, VL);
        value_padded = round_up(a.Dv, VL);
        slot_size = 2 + value_padded;
        std::vector<Routes> routes(plan.BH);
        float *query, *partial, *total;
        auto all = [&](Arena& arena) {
            means.take(arena, plan);
            for (Routes& x : routes) x.take(arena, plan, rows);
            query = arena.take<float>(plan.BH * rows * query_padded);
            partial = arena.take<float>(plan.BH * rows * plan.topk * slot_size);
            total = arena.take<float>(a.threads * value_padded);
        };
        Arena count{nullptr};
        all(count);
        Scratch scratch(count.used);
        if (!scratch.base) return FAILED;
        Arena arena{scratch.base};
        all(arena);

        if (!plan.dense)
            parallel(a.threads, plan.BH * plan.n, [&](int64_t i, int64_t) {
                means.template compute<T>(plan, i / plan.n, i % plan.n);
            });
        parallel(a.threads, plan.BH, [&](int64_t bh, int64_t) {
            routes[bh].template run<T>(plan, means, bh, 0, a.Nq);
            for (int64_t r = 0; r < rows; ++r)
                widen_row(row_of((const T*)a.query, a.query_at, bh / a.Hkv,
                                 routes[bh].head(plan, r), r / plan.G),
                          a.D, query_padded, query + (bh * rows + r) * query_padded);
        });
        std::vector<Item> items;
        std::vector<int32_t> used(plan.BH * rows, 0);
        for (int64_t bh = 0; bh < plan.BH; ++bh)
            for (int64_t j = 0; j < routes[bh].blocks; ++j) {
                int64_t size;
                const int32_t* id = routes[bh].of(plan, j, plan.dense ? j * plan.block : 0, &size);
                if (!size) continue;
                items.push_back({bh, j, {}});
                for (int64_t i = 0; i < size; ++i)
                    items.back().rows.push_back({id[i], used[bh * rows + id[i]]++});
            }
        parallel(a.threads, items.size(),
                 [&](int64_t i, int64_t) { score_and_sum(items[i], query, partial); });
        parallel(a.threads, plan.BH * rows, [&](int64_t i, int64_t thread) {
            merge(i / rows, i % rows, routes[i / rows].count[i % rows], partial,
                  total + thread * value_padded);
        });
        return count.used;
    }
};
