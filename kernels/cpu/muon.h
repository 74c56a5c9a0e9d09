// What an optimizer step does to a matrix before and after Newton-Schulz, each read and written once:
//
//   gather   G <- sign G + decay W;  M <- mu M + (1 - mu) G;  U = mu M + (1 - mu) G, or M
//            X = U / max(|U|, eps), rounded once; NaN, all of it, where U is not finite
//   scatter  W <- keep W + amount O, or where O W > 0 alone:  W <- W - decay W + amount O
//            with `exact`, amount / RMS(O) instead
//
// U is computed twice, for its norm and for X: M and G are still in the cache then, and U would only
// take room there. Sums go slab by slab, in one order on any number of threads. W, G and M are
// [rows, columns] with columns beside each other; X and O have no gaps.
#pragma once
#include "scratch.h"
#include "simd.h"

// Mirrored by class Arguments in muon.py: eight bytes a field, in this order.
struct MuonArguments {
    void *weight, *grad, *buffer;
    bf16* update;  // X or O
    int64_t rows, columns, weight_row, grad_row, buffer_row;  // steps in elements
    int64_t nesterov, cautious, exact, threads;
    double momentum, sign, decay, keep, amount, eps;
};

static inline vf load_as(const float* p) { return load(p); }
static inline vf load_as(const bf16* p) { return widen(p); }
static inline void store_as(float* p, vf x) { store(p, x); }
static inline void store_as(bf16* p, vf x) {
    vu u = (vu)x;
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vu nan = (u >> 16) | 64;  // rounding could make an infinity of it
    *(vh_any*)p = __builtin_convertvector((vu)(x != x) & nan | ~(vu)(x != x) & rounded, vh_any);
}

template <class T>
struct MuonMatrix {
    static constexpr int64_t SLAB = 8192;
    // A sum of squares below this may lack squares that vanished; above, too little to matter.
    static constexpr double SMALLEST_SQUARE = 1e-24;
    const MuonArguments& a;
    const int64_t slabs = ceil_div(a.columns, SLAB);

    // body(first, count) over vectors of a slab, which ends with one that may be narrower.
    template <class F>
    void each(int64_t item, const F& body) const {
        int64_t row = item / slabs, column = item % slabs * SLAB;
        int64_t end = std::min(column + SLAB, a.columns);
        for (; column + VL <= end; column += VL) body(row, column, VL);
        if (column < end) body(row, column, end - column);
    }
    template <class S>
    static vf read(const S* p, int64_t count) {
        if (count == VL) return load_as(p);
        S part[VL] = {};
        std::memcpy(part, p, count * sizeof(S));
        return load_as(part);
    }
    template <class S>
    static void write(S* p, vf x, int64_t count) {
        if (count == VL) return store_as(p, x);
        S part[VL];
        store_as(part, x);
        std::memcpy(p, part, count * sizeof(S));
    }
    T* at(void* p, int64_t step, int64_t row, int64_t column) const {
        return (T*)p + row * step + column;
    }
    // The sum over all slabs of what body(item) gives.
    template <class F>
    double sum_of(const F& body) const {
        std::vector<double> parts(a.rows * slabs);
        parallel(a.threads, parts.size(), [&](int64_t i, int64_t) { parts[i] = body(i); });
        double total = 0;
        for (double part : parts) total += part;
        return total;
    }

    vf gradient(int64_t row, int64_t column, int64_t count) const {
        vf g = read(at(a.grad, a.grad_row, row, column), count) * splat((float)a.sign);
        if (!a.decay) return g;
        vf w = read(at(a.weight, a.weight_row, row, column), count);
        return mul_add(splat((float)a.decay), w, g);
    }
    // from + weight (to - from), from the nearer end as torch.lerp has it.
    static vf between(vf from, vf to, double weight) {
        if (weight < 0.5) return mul_add(splat((float)weight), to - from, from);
        return mul_add(splat((float)weight - 1.0f), to - from, to);
    }
    vf direction(vf m, vf g) const { return a.nesterov ? between(g, m, a.momentum) : m; }

    // U, once the gradient went into the buffer.
    vf direction_at(int64_t row, int64_t column, int64_t count) const {
        vf m = read(at(a.buffer, a.buffer_row, row, column), count);
        return direction(m, gradient(row, column, count));
    }
    // The largest magnitude of a U without NaN.
    float largest() const {
        std::vector<float> parts(a.rows * slabs);
        parallel(a.threads, parts.size(), [&](int64_t item, int64_t) {
            vf most = {};
            each(item, [&](int64_t row, int64_t column, int64_t count) {
                vf u = direction_at(row, column, count);
                u = u < 0 ? -u : u;
                most = u > most ? u : most;
            });
            for (int i = 0; i < VL; ++i) parts[item] = std::max(parts[item], most[i]);
        });
        return *std::max_element(parts.begin(), parts.end());
    }
    // The power of two that brings a magnitude to [0.5, 1), or as near as a float's exponent allows.
    static float nearest_one(float magnitude) {
        int exponent = 0;
        if (std::isfinite(magnitude)) std::frexp(magnitude, &exponent);
        return std::ldexp(1.0f, std::clamp(-exponent, -126, 126));
    }

    void gather() const {
        double square = sum_of([&](int64_t item) {
            vf total = {};
            each(item, [&](int64_t row, int64_t column, int64_t count) {
                T* p = at(a.buffer, a.buffer_row, row, column);
                vf g = gradient(row, column, count);
                write(p, between(read(p, count), g, 1 - a.momentum), count);
                vf u = direction(read(p, count), g);
                total = mul_add(u, u, total);
            });
            return (double)sum(total);
        });
        // Squares of good numbers may overflow or vanish: then U is read again, for its largest
        // magnitude and for the norm of what a power of two brings near 1.
        float by = 1;
        if (square == INFINITY || square < SMALLEST_SQUARE) {
            by = nearest_one(largest());
            square = sum_of([&](int64_t item) {
                vf total = {};
                each(item, [&](int64_t row, int64_t column, int64_t count) {
                    vf u = direction_at(row, column, count) * splat(by);
                    total = mul_add(u, u, total);
                });
                return (double)sum(total);
            });
        }
        vf first = splat(by), scale = splat((float)(1 / std::max(std::sqrt(square), a.eps * by)));
        if (!std::isfinite(square)) scale = splat(NAN);
        parallel(a.threads, a.rows * slabs, [&](int64_t item, int64_t) {
            each(item, [&](int64_t row, int64_t column, int64_t count) {
                vf u = direction_at(row, column, count) * first;
                write(a.update + row * a.columns + column, u * scale, count);
            });
        });
    }

    void scatter() const {
        double amount = a.amount;
        if (a.exact) {
            double square = sum_of([&](int64_t item) {
                vf total = {};
                each(item, [&](int64_t row, int64_t column, int64_t count) {
                    vf o = read(a.update + row * a.columns + column, count);
                    total = mul_add(o, o, total);
                });
                return (double)sum(total);
            });
            double size = std::sqrt((double)(a.rows * a.columns));
            amount *= square != square ? NAN : size / std::max(std::sqrt(square), a.eps);
        }
        vf by = splat((float)amount), keep = splat((float)a.keep), decay = splat((float)a.decay);
        parallel(a.threads, a.rows * slabs, [&](int64_t item, int64_t) {
            each(item, [&](int64_t row, int64_t column, int64_t count) {
                T* p = at(a.weight, a.weight_row, row, column);
                vf w = read(p, count), o = read(a.update + row * a.columns + column, count);
                vf kept = w * keep;
                if (a.cautious) kept = o * w > 0 ? w - w * decay : w;
                write(p, mul_add(o, by, kept), count);
            });
        });
    }
};
