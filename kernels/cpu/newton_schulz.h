// Newton-Schulz steps of [m, n] matrices, m <= n:  X <- a X + (b A + c A^2) X,  A = X X^T.
//
// A run of steps reads X once and writes it once. In between there are only [m, m] matrices:
//
//   A = X X^T                              once a run
//   Z = b A + c A A                        each step: X would become (a + Z) X
//   Q <- a Q + q Z + Z Q,  q <- a q        the run's steps so far, less their multiple q of I
//   A <- (a + Z)^2 A  as  B = a A + Z A, then a B + Z B      X X^T after the step
//   X <- q X + Q X                         once a run
//
// All [m, m] matrices are polynomials of one A: symmetric, and they commute. So half of each of
// their products is computed and mirrored. Runs of one step are the "symmetric" form; longer ones
// the "gram" form, 5 halves of m^3 for what X X^T would cost again. The multiples of I are kept out
// of the rounding to bfloat16: that is where a Gram iteration would lose the small singular values.
//
// Every matrix lies in panels of NR columns, as the B operand of the one matrix product
// (gemm.h). A symmetric matrix's rows are its columns, so that the same panels are its A
// operand; X is kept twice, `along` for Q X and `across` for X X^T. Work goes by blocks of NR x NR.
#pragma once
#include <vector>

#include "gemm.h"
#include "scratch.h"

// Mirrored by class Arguments in newton_schulz.py: eight bytes a field, in this order.
struct NewtonSchulzArguments {
    const void* X;               // [batch] of m x n, one of the two strides is 1
    void* out;                   // the same
    const double* coefficients;  // [steps][3]
    const int64_t* runs;         // steps of each run
    int64_t batch, m, n, run_count, threads;
    int64_t X_batch, X_row, X_column, out_batch, out_row, out_column;  // steps in elements
};

#ifdef MOONFX_BF16
// Rows 2 i and 2 i + 1 as one line of words, each a pair of neighbours along the depth.
static inline void pair_rows(vf even, vf odd, uint32_t* out) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
                                           24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
                                           16, 0);
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, both));
}
// 2 VL values of one row as VL words.
static inline vf pair_columns(const float* p) {
    return (vf)(__m512i)_mm512_cvtne2ps_pbh((__m512)load(p + VL), (__m512)load(p));
}
static inline void unpair_rows(const uint32_t* p, vf& even, vf& odd) {
    vu x = *(const vu*)p;
    even = (vf)(x << 16);
    odd = (vf)(x & 0xffff0000u);
}
#else
static inline void pair_rows(vf, vf, uint32_t*) {}
static inline vf pair_columns(const float*) { return vf{}; }
static inline void unpair_rows(const uint32_t*, vf&, vf&) {}
#endif

template <class E>
struct NewtonSchulz {
    typedef typename E::word word;
    typedef typename E::element element;
    static constexpr int pw = E::per_word;
    static constexpr int64_t LINES = NR / pw;  // of words, in a block
    static constexpr int64_t BLOCK = LINES * NR;
    static constexpr int64_t ROOM = 1 << 30;  // bytes of scratch, of all threads together
    static constexpr int64_t DEPTH = 1024;  // words: two panels of them fit the second-level cache

    // A matrix in panels of NR columns, in whole blocks. Of a block at its end, what its rows and
    // columns fill is written, rounded up to words and registers with zeros; no more is ever read.
    struct Panels {
        word* data = nullptr;
        int64_t blocks = 0;  // of a panel
        word* panel(int64_t j) const { return data + j * blocks * BLOCK; }
        word* block(int64_t i, int64_t j) const { return panel(j) + i * BLOCK; }
    };
    struct Term {
        const Panels* of = nullptr;
        float factor = 0;
    };
    typedef float Tile[NR * NR];
    struct Size {
        int64_t rows, columns;
    };

    const NewtonSchulzArguments& a;
    const int64_t m_blocks = ceil_div(a.m, NR), n_blocks = ceil_div(a.n, NR);
    const int64_t m_words = ceil_div(a.m, pw), n_words = ceil_div(a.n, pw);

    struct Space {
        Panels along, next, across, A, B, Z, Q, R;
    };
    Space take(Arena& arena) const {
        bool gram = false;
        for (int64_t i = 0; i < a.run_count; ++i) gram |= a.runs[i] > 1;
        auto panels = [&](int64_t rows, int64_t columns, bool wanted = true) {
            Panels p;
            p.blocks = rows;
            if (wanted) p.data = arena.take<word>(rows * columns * BLOCK);
            return p;
        };
        Space s;
        s.along = panels(m_blocks, n_blocks);
        s.next = panels(m_blocks, n_blocks, a.run_count > 1);
        s.across = panels(n_blocks, m_blocks);
        s.A = panels(m_blocks, m_blocks);
        s.Z = panels(m_blocks, m_blocks);
        for (Panels* p : {&s.B, &s.Q, &s.R}) *p = panels(m_blocks, m_blocks, gram);
        return s;
    }

    // tile = left^T right over `depth` words; of a block on the diagonal, what lies on or below it.
    static void product(const word* left, const word* right, int64_t depth, Size size,
                        bool diagonal, float* tile) {
        int64_t rows = size.rows;
        int v = (int)ceil_div(size.columns, VL);
        if (rows < NR || v < NV || !depth)
            std::memset(tile, 0, round_up(rows, VL) * NR * sizeof(float));
        for (int64_t k = 0; k < depth; k += DEPTH) {
            int64_t length = std::min(DEPTH, depth - k);
            for (int64_t r = 0; r < rows; r += MR) {
                int m = (int)std::min<int64_t>(MR, rows - r);
                int wide = diagonal ? std::min<int>(v, (int)ceil_div(r + m, VL)) : v;
                float* c[MR];
                for (int i = 0; i < m; ++i) c[i] = tile + (r + i) * NR;
                Columns<word> x{left + k * NR + r, NR};
                if (k)
                    multiply<E, Columns<word>, ADD>(m, wide, x, right + k * NR, NR, length, c, 0);
                else
                    multiply<E, Columns<word>, SET>(m, wide, x, right + k * NR, NR, length, c, 0);
            }
        }
        if (diagonal) mirror(tile, rows);
    }
    static void transpose_square(const float* from, float* to) {
        vf x[VL];
        for (int i = 0; i < VL; ++i) x[i] = load(from + i * NR);
        transpose(x);
        for (int i = 0; i < VL; ++i) store(to + i * NR, x[i]);
    }
    // What lies above the diagonal becomes what lies below it.
    static void mirror(float* tile, int64_t rows) {
        for (int64_t r = 0; r < rows; r += VL) {
            for (int64_t c = 0; c < r; c += VL)
                transpose_square(tile + r * NR + c, tile + c * NR + r);
            for (int64_t i = r; i < r + VL; ++i)
                for (int64_t c = i + 1; c < r + VL; ++c) tile[i * NR + c] = tile[c * NR + i];
        }
    }
    // tile = alpha tile + the sum of the terms' blocks (i, j).
    template <size_t N>
    static void combine(float* tile, Size size, float alpha, const Term (&terms)[N], int64_t i,
                        int64_t j) {
        const word* block[N];
        for (size_t t = 0; t < N; ++t) block[t] = terms[t].of->block(i, j);
        for (int64_t l = 0; l * pw < size.rows; ++l)
            for (int64_t c = 0; c < size.columns; c += VL) {
                float* p = tile + l * pw * NR + c;
                vf x = load(p) * alpha, y = vf{};
                if constexpr (pw == 2) y = load(p + NR) * alpha;
                for (size_t t = 0; t < N; ++t) {
                    vf f = splat(terms[t].factor);
                    if constexpr (pw == 2) {
                        vf even, odd;
                        unpair_rows(block[t] + l * NR + c, even, odd);
                        x = mul_add(even, f, x);
                        y = mul_add(odd, f, y);
                    } else {
                        x = mul_add(load(block[t] + l * NR + c), f, x);
                    }
                }
                store(p, x);
                if constexpr (pw == 2) store(p + NR, y);
            }
    }
    // The tile as a block, depth along its rows.
    static void put(const float* tile, Size size, word* out) {
        for (int64_t l = 0; l * pw < size.rows; ++l)
            for (int64_t c = 0; c < size.columns; c += VL) {
                const float* p = tile + l * pw * NR + c;
                if constexpr (pw == 2)
                    pair_rows(load(p), load(p + NR), out + l * NR + c);
                else
                    store(out + l * NR + c, load(p));
            }
    }
    // The tile's transpose as a block: depth along its columns.
    static void put_transposed(const float* tile, Size size, word* out) {
        for (int64_t r = 0; r < size.rows; r += VL)
            for (int64_t l = 0; l * pw < size.columns; l += VL) {
                vf x[VL];
                for (int i = 0; i < VL; ++i) {
                    const float* p = tile + (r + i) * NR + l * pw;
                    if constexpr (pw == 2)
                        x[i] = pair_columns(p);
                    else
                        x[i] = load(p);
                }
                transpose(x);
                for (int i = 0; i < VL; ++i) store((float*)(out + (l + i) * NR + r), x[i]);
            }
    }

    Size size_of(int64_t i, int64_t j, int64_t columns) const {
        return {std::min<int64_t>(NR, a.m - i * NR), std::min<int64_t>(NR, columns - j * NR)};
    }
    // out = alpha left right + terms, of symmetric matrices that commute, or of X X^T.
    template <size_t N>
    void symmetric(int64_t threads, const Panels& left, const Panels& right, int64_t depth,
                   float alpha, const Term (&terms)[N], const Panels& out) const {
        parallel(threads, m_blocks * (m_blocks + 1) / 2, [&](int64_t item, int64_t) {
            // Items go down the columns of the triangle: one panel of B serves a run of them.
            int64_t j = 0;
            while (item >= m_blocks - j) item -= m_blocks - j++;
            int64_t i = j + item;
            Size size = size_of(i, j, a.m);
            alignas(64) Tile tile;
            product(left.panel(i), right.panel(j), depth, size, i == j, tile);
            if (terms[0].of) combine(tile, size, alpha, terms, i, j);
            put(tile, size, out.block(i, j));
            if (i != j) put_transposed(tile, size, out.block(j, i));
        });
    }

    // X <- q X + Q X; the last of them into the caller's memory.
    void apply(int64_t threads, const Space& s, const Panels& Q, float q, element* out) const {
        parallel(threads, m_blocks * n_blocks, [&](int64_t item, int64_t) {
            int64_t j = item / m_blocks, i = item % m_blocks;
            Size size = size_of(i, j, a.n);
            alignas(64) Tile tile;
            product(Q.panel(i), s.along.panel(j), m_words, size, false, tile);
            combine(tile, size, 1.0f, {Term{&s.along, q}}, i, j);
            if (out) return give(tile, size, out, i, j);
            put(tile, size, s.next.block(i, j));
            put_transposed(tile, size, s.across.block(j, i));
        });
    }
    void read(int64_t threads, const element* X, const Space& s) const {
        parallel(threads, m_blocks * n_blocks, [&](int64_t item, int64_t) {
            int64_t j = item / m_blocks, i = item % m_blocks;
            Size size = size_of(i, j, a.n);
            alignas(64) Tile tile;
            get(X, size, i, j, tile);
            put(tile, size, s.along.block(i, j));
            put_transposed(tile, size, s.across.block(j, i));
        });
    }
    // The block's rows in memory are its own rows, or its columns where X lies transposed.
    void get(const element* X, Size size, int64_t i, int64_t j, float* tile) const {
        bool flip = a.X_column != 1;
        int64_t step = flip ? a.X_column : a.X_row;
        auto [rows, columns] = size;
        if (flip) std::swap(rows, columns);
        const element* p = X + i * NR * a.X_row + j * NR * a.X_column;
        for (int64_t r = 0; r < rows; ++r) widen_row(p + r * step, columns, NR, tile + r * NR);
        std::memset(tile + rows * NR, 0, (NR - rows) * NR * sizeof(float));
        if (flip) transpose_tile(tile);
    }
    void give(float* tile, Size size, element* out, int64_t i, int64_t j) const {
        bool flip = a.out_column != 1;
        int64_t step = flip ? a.out_column : a.out_row;
        auto [rows, columns] = size;
        if (flip) {
            std::swap(rows, columns);
            transpose_tile(tile);
        }
        element* p = out + i * NR * a.out_row + j * NR * a.out_column;
        for (int64_t r = 0; r < rows; ++r) {
            int64_t c = 0;
            if constexpr (pw == 2)
                for (; c + 2 * VL <= columns; c += 2 * VL)
                    store((float*)(p + r * step + c), pair_columns(tile + r * NR + c));
            else
                for (; c + VL <= columns; c += VL)
                    store((float*)(p + r * step + c), load(tile + r * NR + c));
            for (; c < columns; ++c) from_float(tile[r * NR + c], p + r * step + c);
        }
    }
    static void transpose_tile(float* tile) {
        for (int64_t r = 0; r < NR; r += VL)
            for (int64_t c = 0; c <= r; c += VL) {
                float *p = tile + r * NR + c, *q = tile + c * NR + r;
                vf x[VL], y[VL];
                for (int i = 0; i < VL; ++i) x[i] = load(p + i * NR), y[i] = load(q + i * NR);
                transpose(x);
                transpose(y);
                for (int i = 0; i < VL; ++i) store(p + i * NR, y[i]), store(q + i * NR, x[i]);
            }
    }

    void one(int64_t threads, int64_t index, Space s) const {
        element* out = (element*)a.out + index * a.out_batch;
        const double* step = a.coefficients;
        read(threads, (const element*)a.X + index * a.X_batch, s);
        for (int64_t run = 0; run < a.run_count; ++run) {
            symmetric(threads, s.across, s.across, n_words, 1.0f, {Term{}}, s.A);
            double q = 1;
            for (int64_t i = 0; i < a.runs[run]; ++i, step += 3) {
                float a0 = (float)step[0], b = (float)step[1], c = (float)step[2];
                const Panels& Z = i ? s.Z : s.Q.data ? s.Q : s.Z;
                // A cubic step has no A A.
                symmetric(threads, s.A, s.A, c == 0 ? 0 : m_words, c, {Term{&s.A, b}}, Z);
                if (i + 1 < a.runs[run]) {
                    symmetric(threads, Z, s.A, m_words, 1.0f, {Term{&s.A, a0}}, s.B);
                    symmetric(threads, Z, s.B, m_words, 1.0f, {Term{&s.B, a0}}, s.A);
                }
                if (i) {
                    symmetric(threads, Z, s.Q, m_words, 1.0f,
                              {Term{&s.Q, a0}, Term{&s.Z, (float)q}}, s.R);
                    std::swap(s.Q, s.R);
                }
                q *= step[0];
            }
            bool last = run + 1 == a.run_count;
            apply(threads, s, s.Q.data ? s.Q : s.Z, (float)q, last ? out : nullptr);
            std::swap(s.along, s.next);
        }
    }

    // The bytes of scratch, or FAILED.
    int64_t run() const {
        Arena measure{nullptr};
        take(measure);
        // A matrix is one thread's as long as each thread has one and room for it; the rest are all
        // threads' work, one after another.
        int64_t threads = std::max<int64_t>(1, a.threads), teams = threads;
        if (a.batch < threads || measure.used * threads > ROOM) teams = 1;
        Scratch scratch(measure.used * teams);
        if (!scratch.base) return FAILED;
        std::vector<Space> space;
        for (int64_t t = 0; t < teams; ++t) {
            Arena arena{scratch.base + t * measure.used};
            space.push_back(take(arena));
        }
        int64_t alone = teams == threads ? a.batch / teams * teams : 0;
        parallel(teams, alone, [&](int64_t index, int64_t t) { one(1, index, space[t]); });
        for (int64_t index = alone; index < a.batch; ++index) one(threads, index, space[0]);
        return measure.used * teams;
    }
};
