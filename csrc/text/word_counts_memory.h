// Memory of the word tables. Large blocks come straight from the system, aligned for huge pages: a table is hit at
// random, and with 4 KiB pages every second probe would miss the TLB. They go back to it piece by piece while a table
// moves to a larger block, so that old and new together never hold more than the new one will.
#pragma once
#if defined(__linux__)
#include <malloc.h>
#endif
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace herdkern::text {

// Zeroed memory; moves, never copies.
class Pages {
 public:
  static constexpr size_t kHugePage = size_t(2) << 20;

  Pages() = default;
  explicit Pages(size_t num_bytes) : num_bytes_(num_bytes) {
    if (num_bytes < kMapFrom) {
      data_ = static_cast<uint8_t*>(std::aligned_alloc(64, (num_bytes + 63) / 64 * 64));
      if (data_ == nullptr) throw std::bad_alloc();
      std::memset(data_, 0, num_bytes);
      return;
    }
    mapped_bytes_ = num_bytes < kHugePage ? num_bytes : num_bytes + kHugePage;
    void* mapped = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    data_ = mapped_ = static_cast<uint8_t*>(mapped);
    if (num_bytes >= kHugePage) {
      data_ += (kHugePage - uintptr_t(mapped_) % kHugePage) % kHugePage;
      // A wish: without huge pages it is slower, not wrong. What would fill a part of one stays on small pages.
      madvise(data_, num_bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
    }
  }
  Pages(Pages&& other) noexcept { swap(other); }
  Pages& operator=(Pages&& other) noexcept {
    Pages taken(std::move(other));
    swap(taken);
    return *this;
  }
  ~Pages() {
    if (mapped_ != nullptr) {
      munmap(mapped_, mapped_bytes_);
    } else {
      std::free(data_);
    }
  }

  uint8_t* data() const { return data_; }
  size_t num_bytes() const { return num_bytes_; }
  // The whole huge pages of [0, end) may be taken back by the system; their content is lost.
  void give_back(size_t end) {
    const size_t whole = end / kHugePage * kHugePage;
    if (mapped_ == nullptr || whole <= given_back_) return;
    madvise(data_ + given_back_, whole - given_back_, MADV_DONTNEED);
    given_back_ = whole;
  }
  // [0, end) will be written to soon: one call for its pages is quicker than a fault for each, above all while other
  // threads wait. Also a wish.
  void expect_writes(size_t end) {
#ifdef MADV_POPULATE_WRITE
    end = std::min(num_bytes_, (end + kHugePage - 1) / kHugePage * kHugePage);
    if (mapped_ == nullptr || end <= expected_) return;
    madvise(data_ + expected_, end - expected_, MADV_POPULATE_WRITE);
    expected_ = end;
#else
    (void)end;
#endif
  }

 private:
  // What malloc takes back it keeps, and a table that grows leaves many blocks that nobody wants again.
  static constexpr size_t kMapFrom = size_t(1) << 16;

  void swap(Pages& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(mapped_, other.mapped_);
    std::swap(num_bytes_, other.num_bytes_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
    std::swap(given_back_, other.given_back_);
    std::swap(expected_, other.expected_);
  }

  uint8_t* data_ = nullptr;
  uint8_t* mapped_ = nullptr;
  size_t num_bytes_ = 0, mapped_bytes_ = 0, given_back_ = 0, expected_ = 0;
};

// What was freed goes back to the system: the next budget of this process is measured from what it holds.
inline void give_back_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

// Bytes of long words. They never move, and clear() keeps the chunks for the next words.
class ByteArena {
 public:
  // What `store` would add to num_bytes() for a word of this length.
  size_t cost(size_t len) const {
    if (len > kOwnChunkFrom) return len;
    return used_ + len <= kChunk || next_ < chunks_.size() ? 0 : kChunk;
  }
  const uint8_t* store(const uint8_t* bytes, size_t len) {
    num_bytes_ += cost(len);
    uint8_t* place;
    if (len > kOwnChunkFrom) {
      own_chunks_.push_back(std::make_unique<uint8_t[]>(len));
      place = own_chunks_.back().get();
    } else {
      if (used_ + len > kChunk) {
        if (next_ == chunks_.size()) chunks_.push_back(std::make_unique<uint8_t[]>(kChunk));
        current_ = chunks_[next_++].get();
        used_ = 0;
      }
      place = current_ + used_;
      used_ += len;
    }
    std::memcpy(place, bytes, len);
    return place;
  }
  void clear() {
    own_chunks_.clear();
    num_bytes_ = chunks_.size() * kChunk;
    next_ = 0;
    used_ = kChunk;
  }
  size_t num_bytes() const { return num_bytes_; }

 private:
  static constexpr size_t kChunk = 1 << 14, kOwnChunkFrom = 1 << 11;
  std::vector<std::unique_ptr<uint8_t[]>> chunks_, own_chunks_;
  uint8_t* current_ = nullptr;
  size_t next_ = 0, used_ = kChunk, num_bytes_ = 0;
};

}  // namespace herdkern::text
