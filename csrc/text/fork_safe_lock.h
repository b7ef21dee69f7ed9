// A lock that a forked child does not wait for in vain: the thread that holds it may be one that the child does not
// have. What it guards was then caught in the middle of a change, and that is said.
#pragma once
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

namespace herdkern::text {

class ForkSafeLock {
 public:
  ForkSafeLock() = default;
  ForkSafeLock(const ForkSafeLock&) = delete;
  ForkSafeLock& operator=(const ForkSafeLock&) = delete;

  bool try_lock() {
    pid_t free = 0;
    return owner_.compare_exchange_strong(free, getpid(), std::memory_order_acquire);
  }
  // Held for as long as a counting or a training takes, so waiting for it means sleeping.
  void lock() {
    for (int attempt = 0; !try_lock(); ++attempt) {
      const pid_t owner = owner_.load(std::memory_order_relaxed);
      if (owner != 0 && owner != getpid()) {
        throw std::runtime_error(
            "WordCounts: the counts must not be in use by another thread when a process is forked, and they were, so "
            "this child has a part of them alone; load or count them in the child");
      }
      if (attempt < 16) {
        std::this_thread::yield();
      } else {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    }
  }
  void unlock() { owner_.store(0, std::memory_order_release); }

 private:
  std::atomic<pid_t> owner_{0};  // process of the thread that holds it
};

}  // namespace herdkern::text
