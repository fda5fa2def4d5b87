// Threads that run one function together and meet at barriers.

#pragma once
#include <atomic>
#include <cstdint>
#include <omp.h>
#include <sched.h>

// Waiting spins first, for a wait is usually shorter than a system call.
struct Barrier {
    std::atomic<int64_t> arrived{0}, round{0};
    int64_t count = 1;
    void wait() {
        int64_t mine = round.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(mine + 1, std::memory_order_release);
            return;
        }
        for (int64_t spins = 0; round.load(std::memory_order_acquire) == mine; ++spins)
            if (spins > 2000) sched_yield();
    }
};

// One thread's view of the team.
struct Team {
    int64_t index, threads;
    Barrier& barrier;

    void wait() const { barrier.wait(); }
    // this thread's part of n things, in whole units
    void share(int64_t n, int64_t& begin, int64_t& end, int64_t unit = 1) const {
        int64_t units = (n + unit - 1) / unit;
        begin = units * index / threads * unit;
        end = units * (index + 1) / threads * unit;
        if (end > n) end = n;
        if (begin > n) begin = n;
    }
};

template <class Body>
static void together(int64_t threads, Body body) {
    Barrier barrier;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        barrier.count = omp_get_num_threads();  // may be fewer than asked for
        body(Team{omp_get_thread_num(), omp_get_num_threads(), barrier});
    }
}
