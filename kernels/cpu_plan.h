// What every kernel needs before it computes: sizes, the order of real keys, scratch, threads,
// packed operands.
#pragma once
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu_gemm.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

struct Strides {
    int64_t batch, head, token;
};

// Mirrored by class Arguments in cpu.py: eight bytes a field, in this order.
struct Arguments {
    const void *query, *key, *value;
    void* out;
    float* lse;
    const uint8_t* key_mask;  // [B, Nk] or null
    const void* grad_out;
    const float* grad_lse;  // [B, Hq, Nq] or null
    void* grad_query;
    float *grad_key, *grad_value;  // zeroed by the caller
    int64_t B, Hq, Hkv, Nq, Nk, D, Dv, block, topk, sinks, threads;
    double scale;
    Strides query_at, key_at, value_at, out_at, grad_out_at, grad_query_at, grad_key_at,
        grad_value_at;
};

constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.69314718055994531f;
constexpr int64_t FAILED = -1;  // scratch could not be allocated

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// One allocation, on huge pages where the system has them: fresh scratch is paid for by page
// faults.
struct Scratch {
    char* base = nullptr;
    explicit Scratch(int64_t bytes) {
        constexpr int64_t huge = 1 << 21;
        int64_t align = bytes >= huge ? huge : 64;
        base = (char*)aligned_alloc(align, round_up(std::max<int64_t>(bytes, 1), align));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        if (base && bytes >= huge) madvise(base, round_up(bytes, huge), MADV_HUGEPAGE);
#endif
    }
    ~Scratch() { free(base); }
    Scratch(const Scratch&) = delete;
};

// Hands out 64-byte aligned pieces; with base null it only measures.
struct Arena {
    char* base;
    int64_t used = 0;
    template <class T>
    T* take(int64_t count) {
        T* p = (T*)(base + used);
        used += round_up(count * (int64_t)sizeof(T), 64);
        return p;
    }
};

// Runs body(item, thread); items start in ascending order.
template <class F>
static void parallel(int64_t threads, int64_t items, const F& body) {
    threads = std::max<int64_t>(1, std::min(threads, items));
    std::atomic<int64_t> next{0};
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads((int)threads)
        for (int64_t i; (i = next.fetch_add(1)) < items;) body(i, (int64_t)omp_get_thread_num());
        return;
    }
#endif
    for (int64_t i = 0; i < items; ++i) body(i, (int64_t)0);
}

struct Plan {
    const Arguments& a;
    int64_t G, BH;                  // query heads of one kv head; batch times kv heads
    bool dense;                     // every key of every query is selected
    int64_t block, topk;            // in a dense problem the block is ours to choose
    int64_t n;                      // blocks
    std::vector<int32_t> order;     // [B][Nk]: the key index of each rank (empty: no mask)
    std::vector<int32_t> real;      // [B]: how many real keys
    std::vector<int32_t> position;  // [B][Nq]: the rank of the query's last visible key, -1: none

    explicit Plan(const Arguments& args) : a(args) {
        G = a.Hq / a.Hkv;
        BH = a.B * a.Hkv;
        dense = a.topk >= ceil_div(std::max<int64_t>(a.Nk, 1), a.block);
        block = dense ? std::max<int64_t>(512, round_up(ceil_div(a.Nk, 64), NR)) : a.block;
        n = std::max<int64_t>(1, ceil_div(a.Nk, block));
        topk = dense ? n : a.topk;
        real.resize(a.B);
        position.resize(a.B * a.Nq);
        if (a.key_mask) order.resize(a.B * a.Nk);
        for (int64_t b = 0; b < a.B; ++b) {
            int32_t count = 0;
            for (int64_t j = 0; j < a.Nk; ++j) {
                if (!a.key_mask || a.key_mask[b * a.Nk + j]) {
                    if (a.key_mask) order[b * a.Nk + count] = (int32_t)j;
                    ++count;
                }
                int64_t i = j - (a.Nk - a.Nq);
                if (i >= 0) position[b * a.Nq + i] = count - 1;
            }
            real[b] = count;
        }
    }
    int64_t key_index(int64_t b, int64_t rank) const {
        return order.empty() ? rank : order[b * a.Nk + rank];
    }
};

static inline int64_t offset(const Strides& s, int64_t b, int64_t h, int64_t t) {
    return b * s.batch + h * s.head + t * s.token;
}
template <class T>
static inline T* row_of(T* base, const Strides& s, int64_t b, int64_t h, int64_t t) {
    return base + offset(s, b, h, t);
}

// Rows are gathered: no hardware foresees them.
template <class T>
static inline void prefetch(const T* p, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(p + i);
}

template <class E>
static inline int64_t words(int64_t n) {
    return ceil_div(n, E::per_word);
}

// One row as words along its own length: the A operand, and a column of a transposed B operand.
template <class E>
static inline void copy_words(const typename E::element* p, int64_t d, typename E::word* out) {
    typename E::element* o = (typename E::element*)out;
    std::memcpy(o, p, d * sizeof *p);
    if (d % E::per_word) o[d] = 0;
}

// Rows x (per_word of them) as words across rows: the B operand whose depth runs over rows. A null
// row is zero.
template <class E>
static inline void interleave(const typename E::element* const* row, int64_t d, int64_t padded,
                              typename E::word* out) {
    typename E::element* o = (typename E::element*)out;
    for (int p = 0; p < E::per_word; ++p) {
        if (row[p])
            for (int64_t i = 0; i < d; ++i) o[i * E::per_word + p] = row[p][i];
        for (int64_t i = row[p] ? d : 0; i < padded; ++i) o[i * E::per_word + p] = 0;
    }
}

// The keys (or values) of every kv head, by rank, as B operands. Packed once a call: 1 to 3 copies
// of K and V.
//   across [BH][panels][words(d)][NR]            B = K^T: the product's depth runs over channels
//   along  [BH][panels * NR / per_word][padded]  B = K:   the product's depth runs over keys
template <class E>
struct Packed {
    typedef typename E::word word;
    typedef typename E::element element;
    word *across = nullptr, *along = nullptr;
    int64_t d = 0, padded = 0, panels = 0;

    void take(Arena& arena, const Plan& plan, int64_t depth, bool want_across, bool want_along) {
        d = depth;
        padded = round_up(d, VL);
        panels = ceil_div(std::max<int64_t>(plan.a.Nk, 1), NR);
        if (want_across) across = arena.take<word>(plan.BH * panels * words<E>(d) * NR);
        if (want_along) along = arena.take<word>(plan.BH * panels * (NR / E::per_word) * padded);
    }
    const word* panel(int64_t bh, int64_t p) const {
        return across + (bh * panels + p) * words<E>(d) * NR;
    }
    const word* from(int64_t bh, int64_t rank) const {
        return along + (bh * panels * NR + rank) / E::per_word * padded;
    }
    void pack(const Plan& plan, const void* data, const Strides& at, int64_t bh, int64_t p) {
        const element* row[NR];
        int64_t b = bh / plan.a.Hkv, h = bh % plan.a.Hkv;
        for (int64_t c = 0; c < NR; ++c) {
            int64_t rank = p * NR + c;
            row[c] = rank < plan.real[b]
                         ? row_of((const element*)data, at, b, h, plan.key_index(b, rank))
                         : nullptr;
        }
        if (across) {
            word* out = (word*)panel(bh, p);
            element* o = (element*)out;
            for (int64_t c = 0; c < NR; ++c)
                for (int64_t i = 0; i < words<E>(d) * E::per_word; ++i)
                    o[(i / E::per_word * NR + c) * E::per_word + i % E::per_word] =
                        row[c] && i < d ? row[c][i] : element(0);
        }
        if (along)
            for (int64_t c = 0; c < NR; c += E::per_word)
                interleave<E>(row + c, d, padded, (word*)from(bh, p * NR + c));
    }
};
