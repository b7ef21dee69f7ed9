// The words of one thread on their way into a table: in groups by part, and set aside where another thread holds a part
// for long, because it grows or is written to disk.
#pragma once
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "text/word_counts.h"

namespace herdkern::text {

class GroupedWords {
 public:
  explicit GroupedWords(WordCounts& counts)
      : counts_(counts), mask_(counts.num_parts_ - 1), groups_(new Group[counts.num_parts_]) {}

  // The bytes of the word must stay until `flush`.
  void push(const Word& word) {
    Group& group = groups_[word.hash & mask_];
    group.words[group.size] = word;
    if (++group.size == kGroup) bring(size_t(word.hash & mask_));
  }
  void flush() {
    for (size_t part = 0; part <= mask_; ++part) {
      if (groups_[part].size != 0) bring(part);
    }
  }
  // Everything into the table.
  void finish() {
    flush();
    for (size_t part = 0; part <= mask_ && num_aside_ != 0; ++part) {
      if (groups_[part].aside.empty()) continue;
      const std::lock_guard<std::mutex> lock(counts_.parts_[part].mutex);
      add_aside(part);
    }
  }

 private:
  static constexpr uint32_t kGroup = 32;
  // Of all parts together: with them a thread stays within the megabyte that a budget leaves it.
  static constexpr size_t kMostAside = 1 << 13, kMostBytesAside = 1 << 17;
  struct Group {
    uint32_t size = 0;
    Word words[kGroup];
    std::vector<Word> aside;  // those of at most 16 bytes are in their keys, the others in long_words_
  };

  // A part is held for a microsecond, less than it takes to put a thread to sleep, unless it grows.
  static bool try_hold(std::unique_lock<std::mutex>& lock) {
    for (int i = 0; i < 128; ++i) {
      if (lock.try_lock()) return true;
#if defined(__SSE2__)
      _mm_pause();
#endif
    }
    return false;
  }
  void bring(size_t index) {
    Group& group = groups_[index];
    std::unique_lock<std::mutex> lock(counts_.parts_[index].mutex, std::defer_lock);
    if (!try_hold(lock)) {
      if (set_aside(group)) return;
      lock.lock();
    }
    if (!group.aside.empty()) add_aside(index);
    const uint32_t size = group.size;
    group.size = 0;
    add(index, group.words, size);
  }
  void add(size_t index, const Word* words, size_t size) {
    WordMap& map = counts_.parts_[index].map;
    for (size_t i = 0; i < size; ++i) map.prefetch(words[i]);
    for (size_t i = 0; i < size; ++i) counts_.add_to(map, words[i], 1);
  }
  // False, and nothing is done, if that would be too much.
  bool set_aside(Group& group) {
    size_t num_bytes = bytes_aside_;
    for (uint32_t i = 0; i < group.size; ++i) num_bytes += group.words[i].len > 16 ? group.words[i].len : 0;
    if (num_aside_ + group.size > kMostAside || num_bytes > kMostBytesAside) return false;
    bytes_aside_ = num_bytes;
    for (uint32_t i = 0; i < group.size; ++i) {
      Word word = group.words[i];
      word.bytes = word.len > 16 ? long_words_.store(word.bytes, word.len) : nullptr;
      group.aside.push_back(word);
    }
    num_aside_ += group.size;
    group.size = 0;
    return true;
  }
  void add_aside(size_t index) {
    std::vector<Word>& words = groups_[index].aside;
    for (Word& word : words) {
      if (word.len <= 16) word.bytes = reinterpret_cast<const uint8_t*>(&word.key);
    }
    for (size_t i = 0; i < words.size(); i += kGroup) {
      add(index, words.data() + i, std::min<size_t>(kGroup, words.size() - i));
    }
    num_aside_ -= words.size();
    words.clear();
    if (num_aside_ != 0) return;
    long_words_.clear();
    bytes_aside_ = 0;
  }

  WordCounts& counts_;
  const uint64_t mask_;
  std::unique_ptr<Group[]> groups_;
  size_t num_aside_ = 0, bytes_aside_ = 0;
  ByteArena long_words_;
};

}  // namespace herdkern::text
