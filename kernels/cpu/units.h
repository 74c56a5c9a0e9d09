// What the forward and the backward do alike: their scratch, their packed tensors, their units.
#pragma once
#include "route.h"

// Computes the block means, packs the biases, and with `pack` whatever else it packs: one panel of
// a list for one kv head.
template <class T, class F>
static void prepare(const Plan& plan, Bias& bias, Means& means, bool packs, const F& pack) {
    const Arguments& a = plan.a;
    std::vector<Piece> panels, blocks;
    auto gates = [&](const List& x) {
        return x.dense ? 0 : a.block_means ? ceil_div(x.n, NR) : x.n;
    };
    if (packs || bias.heads)
        panels = plan.pieces([](const List& x) { return ceil_div(x.real, NR); });
    if (!plan.dense) blocks = plan.pieces(gates);
    int64_t packed = panels.size(), pooled = blocks.size(), first = a.Hkv * packed;
    parallel(a.threads, a.Hkv * (packed + pooled), [&](int64_t i, int64_t) {
        if (i >= first) {
            const Piece& piece = blocks[(i - first) % pooled];
            const List& x = plan.lists[piece.list];
            if (a.block_means)
                means.copy(plan, x, (i - first) / pooled, piece.index);
            else
                means.template compute<T>(plan, x, (i - first) / pooled, piece.index);
            return;
        }
        const Piece& piece = panels[i % packed];
        const List& x = plan.lists[piece.list];
        pack(x, i / packed, piece.index);
        bias.pack(plan, x, i / packed, piece.index);
    });
}

// Takes the scratch of a pass, packs keys and values, and runs its units, which start in the order
// that they have here.
//
// A pass has take(arena) for what all threads share, take(arena, thread, rows) for what each has,
// and unit(thread, unit, kv head). `most` is the queries of its longest unit. Returns the bytes of
// scratch, or FAILED.
template <class T, class Pass>
static int64_t run_units(Pass& pass, const std::vector<Unit>& units, int64_t most) {
    typedef typename Pass::Thread Thread;
    const Plan& plan = pass.plan;
    const Arguments& a = plan.a;
    Arena count{nullptr};
    pass.take(count);
    Thread t;
    int64_t common = count.used;
    pass.take(count, t, most * plan.G);
    int64_t each = count.used - common, bytes = common + each * a.threads;
    Scratch scratch(bytes);
    if (!scratch.base) return FAILED;
    Arena arena{scratch.base};
    pass.take(arena);
    std::vector<Thread> threads(a.threads);
    for (Thread& thread : threads) pass.take(arena, thread, most * plan.G);

    prepare<T>(plan, pass.bias, pass.means, true, [&](const List& x, int64_t h, int64_t p) {
        pass.key.pack(plan, x, a.key, a.key_at, h, p);
        pass.value.pack(plan, x, a.value, a.value_at, h, p);
    });
    parallel(a.threads, a.Hkv * (int64_t)units.size(), [&](int64_t i, int64_t thread) {
        pass.unit(threads[thread], units[i / a.Hkv], i % a.Hkv);
    });
    return bytes;
}
