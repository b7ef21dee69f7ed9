// How often each word occurs: an open-addressing table with exact keys, and the threaded counting of documents.
// Counts are int64 and checked. What a table holds never depends on the order of documents or on the thread count.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "text/word_key.h"

namespace herdkern::text {

class WordCounts {
 public:
  WordCounts() : entries_(1 << 10) {}

  static constexpr size_t kInline = 16;
  // A word with what the table needs of it; made ahead of add, its slot can be fetched meanwhile.
  struct Word {
    const uint8_t* bytes;
    size_t len;
    WordKey key;  // len <= kInline: the bytes; else low = hash
    uint64_t hash;
  };
  // Bytes up to readable_end may be read.
  static Word make_word(const uint8_t* bytes, size_t len, const uint8_t* readable_end) {
    if (len > kInline) {
      const uint64_t hash = hash_bytes(bytes, len);
      return {bytes, len, {hash, 0}, hash};
    }
    const WordKey key = load_key(bytes, len, readable_end);
    return {bytes, len, key, hash_key(key, len)};
  }
  void prefetch(const Word& word) const { __builtin_prefetch(&entries_[word.hash & (entries_.size() - 1)], 1); }

  // Adds `count` (> 0) to the word. Throws std::overflow_error past 2^63 - 1 and std::length_error for a word of 2^32
  // bytes or more.
  void add(const Word& word, int64_t count);
  void merge(const WordCounts& other);
  void clear() { *this = WordCounts(); }

  size_t num_words() const { return num_words_; }
  // visit(word: std::string_view, count: int64_t) for every word, in no particular order. Views stay good until the
  // table changes.
  template <typename Visit>
  void for_each(Visit&& visit) const {
    for (const Entry& entry : entries_) {
      if (entry.count != 0) visit(word_of(entry), entry.count);
    }
  }

 private:
  struct Entry {
    WordKey key;    // len <= 16: the bytes; else low = hash, high = offset into long_words_
    int64_t count;  // 0: free slot
    uint32_t len;
  };

  std::string_view word_of(const Entry& entry) const {
    const uint8_t* bytes =
        entry.len <= kInline ? reinterpret_cast<const uint8_t*>(&entry.key) : long_words_.data() + entry.key.high;
    return {reinterpret_cast<const char*>(bytes), entry.len};
  }
  bool holds(const Entry& entry, const Word& word) const;
  void grow();

  std::vector<Entry> entries_;  // power of two, at most half full
  size_t num_words_ = 0;
  std::vector<uint8_t> long_words_;
};

// Splits every text with the Llama-3 pattern and counts its words into tables[0 .. num_threads), one table a thread.
void count_words(const std::vector<std::string_view>& texts, int num_threads, std::vector<WordCounts>& tables);

}  // namespace herdkern::text
