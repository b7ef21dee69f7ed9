// A fixed array of zeros on large pages where the system has them: random reads of many megabytes miss the TLB less.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace herdkern::text {

template <typename T>
class HugeArray {
  static_assert(std::is_trivially_destructible_v<T>);

 public:
  HugeArray() = default;
  // All bytes zero. A small array lies on ordinary pages: touching a large page clears two megabytes.
  explicit HugeArray(size_t size) : size_(size) {
    const size_t bytes = size * sizeof(T);
    const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
    void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    if (memory == nullptr) throw std::bad_alloc();
    data_.reset(static_cast<T*>(memory));
#if defined(__linux__)
    if (bytes >= kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    std::memset(memory, 0, bytes);
  }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  static constexpr size_t kHugePage = size_t(1) << 21;
  std::unique_ptr<T[], Free> data_;
  size_t size_ = 0;
};

// A fixed array of zeros whose memory costs nothing before it is written to; on large pages as above.
template <typename T>
class UnwrittenArray {
  static_assert(std::is_trivially_destructible_v<T>);

 public:
  UnwrittenArray() = default;
  explicit UnwrittenArray(size_t size) {
    const size_t bytes = size * sizeof(T), alignment = bytes >= kHugePage ? kHugePage : 64;
    data_.reset(std::calloc(bytes + alignment, 1));
    if (data_ == nullptr) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(data_.get());
    first_ = reinterpret_cast<T*>((address + alignment - 1) / alignment * alignment);
#if defined(__linux__)
    if (bytes >= kHugePage) madvise(first_, bytes, MADV_HUGEPAGE);
#endif
  }
  T& operator[](size_t i) { return first_[i]; }
  const T& operator[](size_t i) const { return first_[i]; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static constexpr size_t kHugePage = size_t(1) << 21;
  std::unique_ptr<void, Free> data_;
  T* first_ = nullptr;
};

}  // namespace herdkern::text
