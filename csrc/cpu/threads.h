// Threads of _ops: OpenMP, so that the pool is the one torch has already started. HK_STD_THREADS takes std::thread
// instead, for compilers without OpenMP and for the thread sanitizer, which cannot see how OpenMP's library waits.
// Work is cut by shape alone and each piece is done by one thread in a fixed order: results never depend on
// num_threads.
#pragma once
#include <atomic>
#include <cstdint>
#ifdef HK_STD_THREADS
#include <thread>
#include <vector>
#endif

#include "cpu/isa.h"

#ifndef HK_ISA
#error "threads.h belongs in a kernel source, which setup.py compiles once per level"
#endif

namespace herdkern::cpu::HK_ISA {

// Threads to use for `work` units (elements moved, or flops / 8): starting a team costs microseconds, so little work is
// done by the caller alone; so is everything in a forked child, where the pool's threads do not exist.
inline int threads_for(int64_t work, int num_threads) {
  constexpr int64_t kWorkPerThread = 16384;
  if (in_forked_child() || work < 2 * kWorkPerThread) return 1;
  const int64_t useful = work / kWorkPerThread;
  return static_cast<int>(useful < num_threads ? useful : num_threads);
}

// Calls work() on each of num_threads threads (or fewer: OpenMP may have no more to give) and returns when all are
// done.
template <typename Work>
inline void run_team(int num_threads, const Work& work) {
#ifdef HK_STD_THREADS
  std::vector<std::thread> team;
  for (int i = 1; i < num_threads; ++i) team.emplace_back(work);
  work();
  for (std::thread& thread : team) thread.join();
#else
#pragma omp parallel num_threads(num_threads)
  work();
#endif
}

// Calls body(task) for every task of [0, count), each on whichever thread is free: for tasks of unequal size. Tasks
// start in ascending order, so a task may wait for one before it.
template <typename Body>
inline void parallel_tasks(int64_t count, int num_threads, const Body& body) {
  if (num_threads > count) num_threads = static_cast<int>(count);
  if (num_threads <= 1 || in_forked_child()) {
    for (int64_t task = 0; task < count; ++task) body(task);
    return;
  }
  std::atomic<int64_t> next{0};
  run_team(num_threads, [&] {
    for (;;) {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= count) return;
      body(task);
    }
  });
}

// Calls body(begin, end) with at most num_threads equal runs that cover [0, count).
template <typename Body>
inline void parallel_ranges(int64_t count, int num_threads, const Body& body) {
  if (num_threads > count) num_threads = static_cast<int>(count);
  if (num_threads <= 1 || in_forked_child()) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  parallel_tasks(num_threads, num_threads, [&](int64_t part) {
    const int64_t begin = count * part / num_threads, end = count * (part + 1) / num_threads;
    if (begin < end) body(begin, end);
  });
}

}  // namespace herdkern::cpu::HK_ISA
