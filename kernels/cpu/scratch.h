// One allocation a call, pieces of it, and work items over threads.
#pragma once
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#else
#include <system_error>
#include <thread>
#include <vector>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

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

// Runs body(item, thread); items start in ascending order. OpenMP's threads wait for the next call,
// and others must be started each time: tens of microseconds.
template <class F>
static void parallel(int64_t threads, int64_t items, const F& body) {
    threads = std::max<int64_t>(1, std::min(threads, items));
    std::atomic<int64_t> next{0};
    auto work = [&](int64_t thread) {
        for (int64_t i; (i = next.fetch_add(1)) < items;) body(i, thread);
    };
    if (threads == 1) return work(0);
#ifdef _OPENMP
#pragma omp parallel num_threads((int)threads)
    work(omp_get_thread_num());
#else
    std::vector<std::thread> others;
    try {
        for (int64_t t = 1; t < threads; ++t) others.emplace_back(work, t);
    } catch (const std::system_error&) {  // the system has no more: those that there are do it
    }
    work(0);
    for (std::thread& t : others) t.join();
#endif
}
