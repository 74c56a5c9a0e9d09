// Operands of the products: rows as words, and packed copies of K, V and the key bias by rank.
#pragma once
#include "plan.h"

constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.69314718055994531f;

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
// of K and V. A list begins at a multiple of VL columns.
//   across [Hkv][panels][words(d)][List::width]     B = K^T: the product's depth runs over channels
//   along  [Hkv][columns / per_word][padded]        B = K:   the product's depth runs over keys
template <class E>
struct Packed {
    typedef typename E::word word;
    typedef typename E::element element;
    word *across = nullptr, *along = nullptr;
    int64_t d = 0, padded = 0, columns = 0;

    void take(Arena& arena, const Plan& plan, int64_t depth, bool want_across, bool want_along) {
        d = depth;
        padded = round_up(d, VL);
        columns = plan.columns;
        int64_t all = plan.a.Hkv * columns + NR;  // whole registers are read from any panel
        if (want_across) across = arena.take<word>(all * words<E>(d));
        if (want_along) along = arena.take<word>(all / E::per_word * padded);
    }
    // The panel that holds this rank.
    const word* panel(const List& x, int64_t h, int64_t rank) const {
        return across + (h * columns + x.column + rank / NR * NR) * words<E>(d);
    }
    const word* from(const List& x, int64_t h, int64_t rank) const {
        return along + (h * columns + x.column + rank) / E::per_word * padded;
    }
    void pack(const Plan& plan, const List& x, const void* data, const Strides& at, int64_t h,
              int64_t p) {
        const element* row[NR];
        int64_t first = p * NR, width = x.width(first);
        for (int64_t c = 0; c < width; ++c)
            row[c] = first + c < x.real ? row_of((const element*)data, at, x.b, h,
                                                 plan.key_index(x, first + c))
                                        : nullptr;
        if (across) {
            element* o = (element*)panel(x, h, first);
            for (int64_t c = 0; c < width; ++c)
                for (int64_t i = 0; i < words<E>(d) * E::per_word; ++i)
                    o[(i / E::per_word * width + c) * E::per_word + i % E::per_word] =
                        row[c] && i < d ? row[c][i] : element(0);
        }
        if (along)
            for (int64_t c = 0; c < width; c += E::per_word)
                interleave<E>(row + c, d, padded, (word*)from(x, h, first + c));
    }
};

// The key bias by rank: [1 or Hq][columns], zero after a list's last key.
struct Bias {
    float* data = nullptr;
    int64_t heads = 0, columns = 0;  // heads: 0 without a bias

    void take(Arena& arena, const Plan& plan) {
        const Arguments& a = plan.a;
        if (!a.key_bias) return;
        heads = a.key_bias_at.head ? a.Hq : 1;
        columns = plan.columns;
        data = arena.take<float>(heads * columns + VL);  // whole registers are read from any rank
    }
    // Null without a bias.
    const float* of(const List& x, int64_t head, int64_t rank) const {
        return heads ? data + (heads > 1 ? head : 0) * columns + x.column + rank : nullptr;
    }
    // The heads whose bias the items of kv head h prepare.
    std::pair<int64_t, int64_t> heads_of(const Plan& plan, int64_t h) const {
        if (heads <= 1) return {0, h ? 0 : heads};
        return {h * plan.G, (h + 1) * plan.G};
    }
    void pack(const Plan& plan, const List& x, int64_t h, int64_t p) {
        const Arguments& a = plan.a;
        auto [head, end] = heads_of(plan, h);
        for (; head < end; ++head) {
            float* out = data + head * columns + x.column;
            for (int64_t r = p * NR; r < p * NR + x.width(p * NR); ++r)
                out[r] = r < x.real ? *row_of(a.key_bias, a.key_bias_at, x.b, head,
                                              plan.key_index(x, r))
                                    : 0.0f;
        }
    }
};
