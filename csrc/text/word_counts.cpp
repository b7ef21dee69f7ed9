// Word counting: see word_counts.h.
#include "text/word_counts.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "text/parallel.h"
#include "text/unicode_split.h"

namespace herdkern::text {

namespace {

void increase(int64_t& total, int64_t count) {
  if (__builtin_add_overflow(total, count, &total)) {
    throw std::overflow_error("word counts: the count of one word must stay below 2**63");
  }
}

constexpr int64_t kTaskBytes = 1 << 18;  // documents are handed to threads in runs of about this size

}  // namespace

void WordCounts::add(const uint8_t* word, size_t len, int64_t count, const uint8_t* readable_end) {
  if (len > kInline) return add_long(word, len, count);
  const WordKey key = load_key(word, len, readable_end);
  const size_t mask = entries_.size() - 1;
  for (size_t slot = hash_key(key, len) & mask;; slot = (slot + 1) & mask) {
    Entry& entry = entries_[slot];
    if (entry.count == 0) return insert(slot, {key, count, uint32_t(len)});
    if (entry.key == key && entry.len == len) return increase(entry.count, count);
  }
}

void WordCounts::add_long(const uint8_t* word, size_t len, int64_t count) {
  if (len > UINT32_MAX) throw std::length_error("word counts: a word must be shorter than 2**32 bytes");
  const uint64_t hash = hash_bytes(word, len);
  const size_t mask = entries_.size() - 1;
  for (size_t slot = hash & mask;; slot = (slot + 1) & mask) {
    Entry& entry = entries_[slot];
    if (entry.count == 0) {
      const Entry fresh{{hash, long_words_.size()}, count, uint32_t(len)};
      long_words_.insert(long_words_.end(), word, word + len);
      return insert(slot, fresh);
    }
    if (entry.len == len && entry.key.low == hash && std::memcmp(&long_words_[entry.key.high], word, len) == 0) {
      return increase(entry.count, count);
    }
  }
}

void WordCounts::insert(size_t slot, const Entry& entry) {
  entries_[slot] = entry;
  if (++num_words_ * 2 > entries_.size()) grow();
}

void WordCounts::grow() {
  std::vector<Entry> old(entries_.size() * 2);
  old.swap(entries_);
  const size_t mask = entries_.size() - 1;
  for (const Entry& entry : old) {
    if (entry.count == 0) continue;
    size_t slot = (entry.len <= kInline ? hash_key(entry.key, entry.len) : entry.key.low) & mask;
    while (entries_[slot].count != 0) slot = (slot + 1) & mask;
    entries_[slot] = entry;
  }
}

void WordCounts::merge(const WordCounts& other) {
  other.for_each([this](std::string_view word, int64_t count) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(word.data());
    add(bytes, word.size(), count, bytes + word.size());
  });
}

void count_words(const std::vector<std::string_view>& texts, int num_threads, std::vector<WordCounts>& tables) {
  num_threads = std::max(1, num_threads);
  if (tables.size() < size_t(num_threads)) tables.resize(num_threads);
  const WordScanner scanner;
  std::vector<size_t> task_begin{0};
  int64_t bytes = 0;
  for (size_t i = 0; i < texts.size(); ++i) {
    bytes += int64_t(texts[i].size());
    if (bytes < kTaskBytes && i + 1 < texts.size()) continue;
    task_begin.push_back(i + 1);
    bytes = 0;
  }
  std::atomic<size_t> next_task{0};
  parallel_for(num_threads, num_threads, [&](int64_t thread) {
    WordCounts& table = tables[thread];
    for (size_t task; (task = next_task.fetch_add(1)) + 1 < task_begin.size();) {
      for (size_t i = task_begin[task]; i < task_begin[task + 1]; ++i) {
        const auto* p = reinterpret_cast<const uint8_t*>(texts[i].data());
        const uint8_t* end = p + texts[i].size();
        while (p < end) {
          const uint8_t* stop = scanner.next(p, end);
          table.add(p, size_t(stop - p), 1, end);
          p = stop;
        }
      }
    }
  });
}

}  // namespace herdkern::text
