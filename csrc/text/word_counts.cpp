// Word counting: see word_counts.h.
#include "text/word_counts.h"

#include <algorithm>
#include <atomic>
#include <iterator>
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

constexpr size_t kTaskBytes = 1 << 18;  // documents are handed to threads in runs of about this size

}  // namespace

bool WordCounts::holds(const Entry& entry, const Word& word) const {
  if (entry.len != word.len || entry.key.low != word.key.low) return false;
  if (word.len <= kInline) return entry.key.high == word.key.high;
  return std::memcmp(&long_words_[entry.key.high], word.bytes, word.len) == 0;
}

void WordCounts::add(const Word& word, int64_t count) {
  const size_t mask = entries_.size() - 1;
  size_t slot = word.hash & mask;
  for (; entries_[slot].count != 0; slot = (slot + 1) & mask) {
    if (holds(entries_[slot], word)) return increase(entries_[slot].count, count);
  }
  if (word.len > UINT32_MAX) throw std::length_error("word counts: a word must be shorter than 2**32 bytes");
  Entry& entry = entries_[slot] = {word.key, count, uint32_t(word.len)};
  if (word.len > kInline) {
    entry.key.high = long_words_.size();
    long_words_.insert(long_words_.end(), word.bytes, word.bytes + word.len);
  }
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
    add(make_word(bytes, word.size(), bytes + word.size()), count);
  });
}

namespace {

// Words go through in groups: first all are cut and their slots asked for, then all are counted.
void count_text(std::string_view text, const WordScanner& scanner, WordCounts& table) {
  WordCounts::Word words[16];
  const auto* p = reinterpret_cast<const uint8_t*>(text.data());
  const uint8_t* end = p + text.size();
  while (p < end) {
    size_t num_words = 0;
    for (; num_words < std::size(words) && p < end; ++num_words) {
      const uint8_t* stop = scanner.next(p, end);
      words[num_words] = WordCounts::make_word(p, size_t(stop - p), end);
      table.prefetch(words[num_words]);
      p = stop;
    }
    for (size_t i = 0; i < num_words; ++i) table.add(words[i], 1);
  }
}

}  // namespace

void count_words(const std::vector<std::string_view>& texts, int num_threads, std::vector<WordCounts>& tables) {
  num_threads = std::max(1, num_threads);
  if (tables.size() < size_t(num_threads)) tables.resize(num_threads);
  const WordScanner scanner;
  const std::vector<size_t> borders = task_borders(texts, kTaskBytes);
  std::atomic<size_t> next_task{0};
  parallel_for(num_threads, num_threads, [&](int64_t thread) {
    WordCounts& table = tables[thread];
    for (size_t task; (task = next_task.fetch_add(1)) + 1 < borders.size();) {
      for (size_t i = borders[task]; i < borders[task + 1]; ++i) count_text(texts[i], scanner, table);
    }
  });
}

}  // namespace herdkern::text
