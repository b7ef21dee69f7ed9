// Threads of _ops: OpenMP, so that the pool is the one torch has already started.
// Work is cut by shape alone and each piece is done by one thread in a fixed order: results never depend on
// num_threads.
#pragma once
#include <cstdint>

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

// Calls body(begin, end) with at most num_threads equal runs that cover [0, count).
template <typename Body>
inline void parallel_ranges(int64_t count, int num_threads, const Body& body) {
  if (num_threads > count) num_threads = static_cast<int>(count);
  if (num_threads <= 1 || in_forked_child()) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
#pragma omp parallel for num_threads(num_threads) schedule(static, 1)
  for (int part = 0; part < num_threads; ++part) {
    const int64_t begin = count * part / num_threads, end = count * (part + 1) / num_threads;
    if (begin < end) body(begin, end);
  }
}

// Calls body(task) for every task of [0, count), each on whichever thread is free: for tasks of unequal size.
template <typename Body>
inline void parallel_tasks(int64_t count, int num_threads, const Body& body) {
  if (num_threads > count) num_threads = static_cast<int>(count);
  if (num_threads <= 1 || in_forked_child()) {
    for (int64_t task = 0; task < count; ++task) body(task);
    return;
  }
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < count; ++task) body(task);
}

}  // namespace herdkern::cpu::HK_ISA
