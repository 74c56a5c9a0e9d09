// What a call is about: its arguments, and its tokens as lists of those that may attend each other.
#pragma once
#include <unordered_map>
#include <vector>

#include "gemm.h"
#include "scratch.h"

struct Strides {
    int64_t batch, head, token;
};

// Mirrored by class Arguments in moba.py: eight bytes a field, in this order.
struct Arguments {
    const void *query, *key, *value;
    void* out;
    float* lse;
    const uint8_t* key_mask;   // [B, Nk] or null
    const float* key_bias;     // [B, Hq, Nk] (a broadcast dimension has stride 0) or null
    const int64_t* segments;   // [B, Nk] or null
    const float* block_means;  // [B, Hkv, m, D] or null: causal only, and not with segments
    const void* grad_out;
    const float* grad_lse;  // [B, Hq, Nq] or null
    void* grad_query;
    float *grad_key, *grad_value;  // zeroed by the caller
    float* grad_bias;              // [B, Hq, Nk], zeroed by the caller; null without a key_bias
    int64_t B, Hq, Hkv, Nq, Nk, D, Dv, block, topk, sinks, causal, threads;
    double scale, softcap;
    Strides query_at, key_at, value_at, out_at, grad_out_at, grad_query_at, grad_key_at,
        grad_value_at, key_bias_at, block_means_at;
};

// A row of the batch, or one segment of it. Its real keys are numbered by rank; whatever follows
// knows ranks only, so that a packed sequence is computed exactly as if it were alone.
struct List {
    int64_t b = 0;
    int64_t length = 0, real = 0;    // its tokens, and how many of them are real keys
    int64_t keys = 0;                // where its ranks begin in Plan::order
    int64_t queries = 0, query = 0;  // how many, and where they begin in Plan::rank, Plan::token
    int64_t column = 0;              // where its ranks begin among the packed columns
    int64_t means = 0;               // where its blocks begin among the columns of means
    bool dense = false;              // every key that a query may see is selected
    int64_t block = 0, topk = 0, n = 0;  // n blocks; in a dense list their size is ours to choose

    // Columns of the panel that holds this rank: NR, but at the list's end only the registers that
    // it fills, and where it fills none only the keys (by pairs), for there may be as many lists as
    // tokens. A register is then read beyond the panel; what it finds there is masked.
    int64_t width(int64_t rank) const { return std::min<int64_t>(NR, columns() - rank / NR * NR); }
    int64_t columns() const { return round_up(real, unit()); }
    int64_t unit() const { return real < VL ? 2 : VL; }
};

struct Piece {
    int32_t list, index;
};

struct Plan {
    const Arguments& a;
    int64_t G;  // query heads of one kv head
    std::vector<List> lists;
    std::vector<int32_t> order;  // [B][Nk]: the key of each rank (empty: rank is the index)
    std::vector<int32_t> token;  // [B][Nq]: the queries, list by list (empty: in their order)
    std::vector<int32_t> rank;   // [B][Nq]: that of the last real key up to the query, -1: none
    // Of the lists that have queries: whether all are dense, the most blocks, the most topk, and
    // all their columns.
    bool dense = true;
    int64_t n = 1, topk = 1, columns = 0, mean_columns = 0;

    explicit Plan(const Arguments& args) : a(args), G(args.Hq / args.Hkv) {
        rank.resize(a.B * a.Nq);
        if (a.key_mask || a.segments) order.resize(a.B * a.Nk);
        if (a.segments) token.resize(a.B * a.Nq);
        std::vector<int32_t> which(a.segments ? a.Nk : 0);
        for (int64_t b = 0; b < a.B; ++b) {
            size_t first = lists.size();
            if (a.segments)
                number(b, which);
            else
                lists.emplace_back().b = b;
            fill(b, lists.data() + first, lists.data() + lists.size(),
                 a.segments ? which.data() : nullptr);
        }
        for (List& x : lists) {
            x.dense = a.topk >= ceil_div(std::max<int64_t>(x.length, 1), a.block);
            x.block = x.dense ? std::max<int64_t>(512, round_up(ceil_div(x.length, 64), NR))
                              : a.block;
            x.n = std::max<int64_t>(1, ceil_div(x.length, x.block));
            x.topk = x.dense ? x.n : a.topk;
            if (!x.queries) continue;
            dense &= x.dense;
            n = std::max(n, x.n);
            topk = std::max(topk, x.topk);
            x.column = round_up(columns, x.unit());
            columns = x.column + x.columns();
            x.means = mean_columns;
            if (!x.dense) mean_columns += round_up(x.n, VL);
        }
    }
    int64_t key_index(const List& x, int64_t r) const {
        return order.empty() ? r : order[x.keys + r];
    }
    int64_t query_index(const List& x, int64_t i) const {
        return token.empty() ? i : token[x.query + i];
    }
    // The rank of the last key that query i of a list sees, -1: none.
    int64_t reach(const List& x, int64_t i) const {
        return a.causal ? rank[x.query + i] : x.real - 1;
    }

    // One piece for each of the first count(list) whatevers of each list that has queries.
    template <class F>
    std::vector<Piece> pieces(const F& count) const {
        std::vector<Piece> all;
        for (size_t i = 0; i < lists.size(); ++i)
            for (int64_t j = 0, end = lists[i].queries ? count(lists[i]) : 0; j < end; ++j)
                all.push_back({(int32_t)i, (int32_t)j});
        return all;
    }

  private:
    // One list for each segment id of row b, in order of appearance; which[j] is key j's.
    void number(int64_t b, std::vector<int32_t>& which) {
        const int64_t* id = a.segments + b * a.Nk;
        std::unordered_map<int64_t, int32_t> known;
        for (int64_t j = 0; j < a.Nk; ++j) {
            if (j && id[j] == id[j - 1]) {
                which[j] = which[j - 1];
                continue;
            }
            auto [at, fresh] = known.try_emplace(id[j], (int32_t)known.size());
            if (fresh) lists.emplace_back().b = b;
            which[j] = at->second;
        }
    }
    void fill(int64_t b, List* first, List* last, const int32_t* which) {
        int64_t before = a.Nk - a.Nq, keys = b * a.Nk, query = b * a.Nq;
        const uint8_t* mask = a.key_mask ? a.key_mask + b * a.Nk : nullptr;
        if (!mask && !which) {  // the common case: a decoded token should not wait for the loops
            first->length = first->real = a.Nk;
            first->keys = keys;
            first->queries = a.Nq;
            first->query = query;
            for (int64_t i = 0; i < a.Nq; ++i) rank[query + i] = (int32_t)(before + i);
            return;
        }
        for (int64_t j = 0; j < a.Nk; ++j) {
            List& x = first[which ? which[j] : 0];
            ++x.length;
            x.real += !mask || mask[j];
            x.queries += j >= before;
        }
        for (List* x = first; x < last; ++x) {
            x->keys = keys;
            x->query = query;
            keys += x->real;
            query += x->queries;
            x->real = x->queries = 0;
        }
        for (int64_t j = 0; j < a.Nk; ++j) {
            List& x = first[which ? which[j] : 0];
            if (!mask || mask[j]) {
                if (!order.empty()) order[x.keys + x.real] = (int32_t)j;
                ++x.real;
            }
            if (j < before) continue;
            if (!token.empty()) token[x.query + x.queries] = (int32_t)(j - before);
            rank[x.query + x.queries++] = (int32_t)x.real - 1;
        }
    }
};
