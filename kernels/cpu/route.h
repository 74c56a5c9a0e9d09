// Which blocks each query attends, and which queries attend each block. Units of queries.
#pragma once
#include "gate.h"

// The rows of one unit (queries first..last of a list, for one kv head's group; row = (query -
// first) * G + head in group) and, for each block, the rows that selected it in ascending order:
// hence in ascending order of position.
struct Routes {
    int32_t *position, *count, *selected;  // [rows]: last visible rank; [rows]; [rows][topk]
    int32_t *start, *rows;                 // CSR by block (dense: rows are the identity)
    float *scores, *query, *value;
    float* shift;       // [rows]: the largest bias that the row sees; null without one
    int32_t* two;       // [2][topk]
    int64_t* query_at;  // [rows]: where the row's query begins
    int64_t total, blocks, score_rows;
    const List* list;
    int64_t h, first;

    static int64_t rows_at_once(const Plan& plan) {
        int64_t at_once = 65536 / round_up(plan.n, NR) / MR * MR;
        return std::min<int64_t>(96, std::max<int64_t>(MR, at_once));
    }
    void take(Arena& arena, const Plan& plan, int64_t most) {
        int64_t topk = plan.dense ? 1 : plan.a.topk;
        score_rows = rows_at_once(plan);
        position = arena.take<int32_t>(most);
        count = arena.take<int32_t>(most);
        query_at = arena.take<int64_t>(most);
        shift = plan.a.key_bias ? arena.take<float>(most) : nullptr;
        start = arena.take<int32_t>(plan.n + 2);
        rows = arena.take<int32_t>(most * topk);
        if (plan.dense) return;
        selected = arena.take<int32_t>(most * topk);
        scores = arena.take<float>(score_rows * round_up(plan.n, NR));
        query = arena.take<float>(score_rows * plan.a.D);
        value = arena.take<float>(topk);
        two = arena.take<int32_t>(2 * topk);
    }
    int64_t head(const Plan& plan, int64_t r) const { return h * plan.G + r % plan.G; }
    int64_t token(const Plan& plan, int64_t r) const {
        return plan.query_index(*list, first + r / plan.G);
    }

    template <class T>
    void run(const Plan& plan, const Means& means, const List& x, int64_t kv_head, int64_t from,
             int64_t to) {
        list = &x;
        h = kv_head;
        first = from;
        total = (to - from) * plan.G;
        int64_t last = -1;
        for (int64_t i = from, r = 0; i < to; ++i) {
            int64_t t = plan.query_index(x, i);
            last = plan.reach(x, i);
            for (int64_t g = 0; g < plan.G; ++g, ++r) {
                position[r] = (int32_t)last;
                query_at[r] = offset(plan.a.query_at, x.b, h * plan.G + g, t);
            }
        }
        blocks = last < 0 ? 0 : last / x.block + 1;
        if (shift) find_shifts(plan, means.heads);
        if (x.dense) {
            for (int64_t r = 0; r < total; ++r) {
                rows[r] = (int32_t)r;
                count[r] = position[r] < 0 ? 0 : (int32_t)(position[r] / x.block + 1);
            }
            return;
        }
        for (int64_t r = 0; r < total; r += score_rows) {
            int64_t end = std::min(total, r + score_rows);
            if (plan.a.causal)
                choose<T, true>(plan, means, r, end);
            else
                choose<T, false>(plan, means, r, end);
        }
        int64_t k = x.topk;
        std::fill(start, start + blocks + 2, 0);
        for (int64_t r = 0; r < total; ++r)
            for (int32_t i = 0; i < count[r]; ++i) ++start[selected[r * k + i] + 2];
        for (int64_t j = 2; j < blocks + 2; ++j) start[j] += start[j - 1];
        for (int64_t r = 0; r < total; ++r)
            for (int32_t i = 0; i < count[r]; ++i)
                rows[start[selected[r * k + i] + 1]++] = (int32_t)r;
    }

    float shift_of(int64_t r) const { return shift ? shift[r] : 0.0f; }

    void find_shifts(const Plan& plan, const Bias& bias) {
        for (int64_t g = 0; g < plan.G; ++g) {
            const float* b = bias.of(*list, h * plan.G + g, 0);
            float top = -INFINITY;
            for (int64_t r = g, seen = 0; r < total; r += plan.G) {
                for (; seen <= position[r]; ++seen) top = std::max(top, b[seen]);
                shift[r] = top == -INFINITY ? 0.0f : top;
            }
        }
    }

    // The blocks of rows r0..end, in no particular order.
    template <class T, bool causal>
    void choose(const Plan& plan, const Means& means, int64_t r0, int64_t end) {
        const List& x = *list;
        int64_t width = round_up(x.n, NR), k = x.topk, sinks = plan.a.sinks;
        int32_t block = (int32_t)std::min<int64_t>(x.block, INT32_MAX);
        int32_t seen = position[end - 1] < 0 ? 0 : position[end - 1] / block;
        // Candidates lie before the own block, or else are all blocks. In both directions a query
        // whose own block is a sink has a place for one more.
        int64_t candidates = causal ? seen : seen + 1;
        if (candidates >= k + !causal && k - causal > sinks)
            score<T>(plan, means, r0, end, sinks / NR, candidates);
        for (int64_t r = r0; r < end; ++r) {
            int32_t* out = selected + r * k;
            int32_t mine = position[r] / block, all = mine + 1;
            if (!causal) mine = std::max(plan.rank[x.query + first + r / plan.G], 0) / block;
            count[r] = position[r] < 0 ? 0 : (int32_t)std::min<int64_t>(all, k);
            if (all <= k) {
                for (int32_t j = 0; j < count[r]; ++j) out[j] = j;
                continue;
            }
            for (int32_t j = 0; j < sinks; ++j) out[j] = j;
            float* s = scores + (r - r0) * width;
            if (!causal && mine < sinks) {
                best_blocks(s, sinks, all, k - sinks, value, out + sinks);
                continue;
            }
            if (causal)
                best_blocks(s, sinks, mine, k - 1 - sinks, value, out + sinks);
            else
                best_but_own(s, sinks, mine, all, k - 1 - sinks, value, two, out + sinks);
            out[k - 1] = mine;
        }
    }

    // The gate of rows r0..end for panels p.. up to block `last`.
    template <class T>
    void score(const Plan& plan, const Means& means, int64_t r0, int64_t end, int64_t p,
               int64_t last) {
        const List& x = *list;
        int64_t width = round_up(x.n, NR), m = end - r0;
        for (int64_t r = 0; r < m; ++r)
            widen_row((const T*)plan.a.query + query_at[r0 + r], plan.a.D, plan.a.D,
                      query + r * plan.a.D);
        for (; p * NR < last; ++p) {
            int64_t ldb = Means::width(x, p);
            for (int64_t g = 0; g < m; g += MR) {
                int rows_now = (int)std::min<int64_t>(MR, m - g);
                Rows<float> a;
                float* c[MR];
                for (int i = 0; i < rows_now; ++i) {
                    a.row[i] = query + (g + i) * plan.a.D;
                    c[i] = scores + (g + i) * width;
                }
                multiply<Float32, Rows<float>, SET>(rows_now, (int)(ldb / VL), a,
                                                    means.panel(x, h, p), ldb, plan.a.D, c, p * NR);
                for (int i = 0; means.bias && i < rows_now; ++i) {
                    const float* bias = means.bias_of(x, head(plan, r0 + g + i)) + p * NR;
                    for (int64_t j = 0; j < ldb; j += VL)
                        store(c[i] + p * NR + j, load(c[i] + p * NR + j) + load(bias + j));
                }
            }
        }
    }

    // The rows of block j whose position is at least `reach`.
    const int32_t* of(int64_t j, int64_t reach, int64_t* size) const {
        const int32_t *lo = list->dense ? rows : rows + start[j],
                      *hi = list->dense ? rows + total : rows + start[j + 1];
        lo = std::partition_point(lo, hi, [&](int32_t r) { return position[r] < reach; });
        *size = hi - lo;
        return lo;
    }
};

// How many queries a unit of a list takes: enough rows on each block to pay for reading it, few
// enough to share the work, which is `queries` of all heads and lists.
static inline int64_t queries_per_unit(const Plan& plan, const List& x, int64_t share) {
    int64_t history = std::max<int64_t>(1, x.topk - 1), all = std::max<int64_t>(x.queries, 1);
    int64_t queries = x.dense ? ceil_div(768, plan.G) : ceil_div(256 * x.n, plan.G * history);
    queries = std::min(
        queries, std::max<int64_t>(1, std::min<int64_t>(8192, (1 << 20) / x.topk) / plan.G));
    queries = std::min(queries, share);
    queries = std::max<int64_t>(queries, ceil_div(96, plan.G));
    return std::max<int64_t>(1, ceil_div(all, ceil_div(all, queries)));
}

// Queries from..to of a list.
struct Unit {
    const List* list;
    int64_t chunk, from, to;
};

// The units of one kv head: chunk by chunk. queries(list) is a chunk's size.
template <class F>
static std::vector<Unit> units_of(const Plan& plan, const F& queries, int64_t* most) {
    std::vector<Unit> all;
    *most = 1;
    for (const List& x : plan.lists) {
        int64_t step = queries(x);
        *most = std::max(*most, std::min(step, x.queries));
        for (int64_t from = 0, chunk = 0; from < x.queries; from += step)
            all.push_back({&x, chunk++, from, std::min(x.queries, from + step)});
    }
    std::stable_sort(all.begin(), all.end(),
                     [](const Unit& a, const Unit& b) { return a.chunk < b.chunk; });
    return all;
}
