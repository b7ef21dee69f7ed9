// Threads for the text kernels: work is cut into numbered tasks whose results do not depend on who runs them.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string_view>
#include <system_error>
#include <thread>
#include <vector>

namespace herdkern::text {

// Calls task(index) once for every index in [0, num_tasks) on at most num_threads threads (the caller is one of them).
// The first exception of a task is thrown again here after all threads have ended. Threads live for this call only, so
// a forked child never waits for threads that it does not have.
template <typename Task>
void parallel_for(int64_t num_tasks, int num_threads, Task&& task) {
  if (num_threads <= 1 || num_tasks <= 1) {
    for (int64_t i = 0; i < num_tasks; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1)) < num_tasks;) {
      try {
        task(i);
      } catch (...) {
        std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
        next.store(num_tasks);
      }
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(std::min<int64_t>(num_threads, num_tasks)));
  const int64_t extra = std::min<int64_t>(num_threads, num_tasks) - 1;
  try {
    for (int64_t i = 0; i < extra; ++i) threads.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads to be had: those that started do the work
  }
  work();
  for (auto& thread : threads) thread.join();
  if (error) std::rethrow_exception(error);
}

// Cuts texts into runs of about task_bytes for parallel_for: task i has texts [borders[i], borders[i + 1]). size_of(i):
// the bytes of a text.
template <typename SizeOf>
std::vector<size_t> task_borders(size_t num_texts, size_t task_bytes, SizeOf&& size_of) {
  std::vector<size_t> borders{0};
  size_t bytes = 0;
  for (size_t i = 0; i < num_texts; ++i) {
    bytes += size_of(i);
    if (bytes < task_bytes && i + 1 < num_texts) continue;
    borders.push_back(i + 1);
    bytes = 0;
  }
  return borders;
}
inline std::vector<size_t> task_borders(const std::vector<std::string_view>& texts, size_t task_bytes) {
  return task_borders(texts.size(), task_bytes, [&](size_t i) { return texts[i].size(); });
}

}  // namespace herdkern::text
