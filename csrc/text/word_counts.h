// How often each word occurs: an open-addressing table with exact keys, and the threaded counting of documents.
//
// Counts are int64 and checked. What a table holds never depends on the order of documents or on the number of threads.
// The table is cut into parts by the hash of the word, each behind its own lock, so all threads count into one table:
// no copy for each thread, no merging afterwards. A thread collects words for a part and brings 32 at once; their slots
// are fetched together, so a group waits for memory once. While a part grows, which takes milliseconds, the other
// threads set its words aside. Slots are in order of the hash (multiply-shift, any
// capacity), so a part grows by reading and writing straight through, whatever its size. Tried: a table for each thread
// (twice the memory, and a merge at the end), a small front table for the frequent words (they stay in the L2 cache
// without help).
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string_view>
#include <vector>

#include "text/any_text.h"
#include "text/splitter.h"
#include "text/word_counts_memory.h"
#include "text/word_key.h"

namespace herdkern::text {

class RunFile;

// From this length on a word must fit into the limit of a table, or is written to disk by itself.
constexpr size_t kHugeWord = size_t(1) << 15;

// A word with what the table needs of it.
struct Word {
  const uint8_t* bytes;
  WordKey key;  // len <= 16: all bytes; else low = the first 8, high = 0
  uint64_t hash;
  size_t len;
};

// Bytes up to readable_end may be read; len > 0.
inline Word make_word(const uint8_t* bytes, size_t len, const uint8_t* readable_end) {
  if (len <= 16) {
    const WordKey key = load_key(bytes, len, readable_end);
    return {bytes, key, hash_key(key, len), len};
  }
  WordKey key{0, 0};
  std::memcpy(&key.low, bytes, 8);
  return {bytes, key, hash_bytes(bytes, len), len};
}

// One part of the table.
class WordMap {
 public:
  WordMap();

  // Adds `count` (> 0) to the word. False, with nothing added, if the word is new and max_bytes leaves no room for it;
  // an empty map takes any word shorter than kHugeWord. Throws std::overflow_error past 2^63 - 1, std::length_error
  // from 2^32 bytes on.
  bool add(const Word& word, int64_t count) {
    size_t slot = home(word.hash);
    const uint32_t tag = uint32_t(word.hash >> 32);
    for (; entries_[slot].count != 0; slot = slot + 1 == capacity_ ? 0 : slot + 1) {
      Entry& entry = entries_[slot];
      if (entry.tag == tag && entry.len == word.len && entry.low == word.key.low &&
          (word.len <= 16 ? entry.high == word.key.high : same_long(entry, word))) {
        increase(entry.count, count);
        return true;
      }
    }
    return insert(word, count, slot);
  }
  void prefetch(const Word& word) const { __builtin_prefetch(&entries_[home(word.hash)], 1); }

  void limit_bytes(size_t max_bytes) { max_bytes_ = max_bytes; }
  size_t max_bytes() const { return max_bytes_; }
  size_t num_words() const { return num_words_; }
  size_t num_bytes() const { return pages_.num_bytes() + long_words_.num_bytes(); }
  // visit(word: std::string_view, count: int64_t), in no particular order.
  template <typename Visit>
  void for_each(Visit&& visit) const {
    for (size_t i = 0; i < capacity_; ++i) {
      if (entries_[i].count != 0) visit(word_of(entries_[i]), entries_[i].count);
    }
  }
  // use(words) with words(visit) as for_each, in byte order, and the map is empty afterwards, also when `use` throws;
  // it keeps its memory. Sorts in place, and what is sorted is no table: a look-up in it might not end.
  template <typename Use>
  void drain(Use&& use) {
    struct Clear {
      WordMap& map;
      ~Clear() { map.clear(); }
    } const clear{*this};
    sort_entries();
    use([this](auto&& visit) {
      for (size_t i = 0; i < num_words_; ++i) visit(word_of(entries_[i]), entries_[i].count);
    });
  }
  void clear();

  struct Entry {         // half a cache line
    uint64_t low, high;  // len <= 16: the bytes, padded with zeros; else the first 8 and the address of all
    int64_t count;       // 0: free slot
    uint32_t len, tag;   // tag: upper half of the hash
  };
  static_assert(sizeof(Entry) == 32, "two entries fill a cache line");
  void collect(std::vector<const Entry*>& entries) const {
    for (size_t i = 0; i < capacity_; ++i) {
      if (entries_[i].count != 0) entries.push_back(&entries_[i]);
    }
  }
  static bool before(const Entry& a, const Entry& b);  // byte order of the words
  static std::string_view word_of(const Entry& entry) {
    const void* bytes = entry.len <= 16 ? static_cast<const void*>(&entry) : reinterpret_cast<const void*>(entry.high);
    return {static_cast<const char*>(bytes), entry.len};
  }

 private:
  static void increase(int64_t& total, int64_t count) {
    if (__builtin_add_overflow(total, count, &total)) overflow();
  }
  [[noreturn]] static void overflow();
  static bool same_long(const Entry& entry, const Word& word) {
    return std::memcmp(reinterpret_cast<const void*>(entry.high), word.bytes, word.len) == 0;
  }
  size_t home(uint64_t hash) const { return size_t((hash >> 32) * capacity_ >> 32); }
  bool insert(const Word& word, int64_t count, size_t slot);
  bool grow(size_t max_table_bytes);
  void sort_entries();

  Pages pages_;
  Entry* entries_ = nullptr;  // in pages_
  size_t capacity_ = 0;       // below 2^32, any number
  size_t num_words_ = 0, max_words_ = 0;
  size_t max_bytes_ = SIZE_MAX;
  ByteArena long_words_;
};

class WordCounts {
 public:
  // overflow: where a part's words go, sorted, when it has reached its share of max_bytes; it must outlive the table.
  explicit WordCounts(size_t max_bytes = SIZE_MAX, RunFile* overflow = nullptr);

  // From one thread at a time.
  void add(const Word& word, int64_t count);
  void merge(const WordCounts& other);  // may be this table: then every count doubles
  // Writes everything to the overflow file and is empty afterwards.
  void drain(int num_threads);

  size_t num_words() const;
  // visit(word: std::string_view, count: int64_t) for every word, in no particular order. Views stay good until the
  // table changes.
  template <typename Visit>
  void for_each(Visit&& visit) const {
    for (size_t i = 0; i < num_parts_; ++i) parts_[i].map.for_each(visit);
  }
  // The same, and the memory of words goes back soon after they were visited; the table is empty afterwards.
  template <typename Visit>
  void give_away(Visit&& visit) {
    for (size_t i = 0; i < num_parts_; ++i) {
      const WordMap map = std::move(parts_[i].map);
      parts_[i].map = WordMap();
      map.for_each(visit);
    }
  }
  // The same in byte order.
  template <typename Visit>
  void for_each_sorted(Visit&& visit) const {
    for (const WordMap::Entry* entry : sorted()) visit(WordMap::word_of(*entry), entry->count);
  }

 private:
  friend class GroupedWords;  // grouped_words.h
  struct alignas(64) Part {
    std::mutex mutex;
    WordMap map;
  };
  static size_t parts_for_this_machine();
  std::vector<const WordMap::Entry*> sorted() const;
  // The part's lock is held, or there is one thread.
  void add_to(WordMap& map, const Word& word, int64_t count) {
    if (!map.add(word, count)) make_room(map, word, count);
  }
  void make_room(WordMap& map, const Word& word, int64_t count);

  size_t num_parts_;  // a power of two
  std::unique_ptr<Part[]> parts_;
  RunFile* overflow_;
};

// Splits every text and counts its words on num_threads threads. Calls refuse(text, place) for the first text with a
// lone surrogate, before any word is counted; that must throw.
void count_words(const std::vector<AnyText>& texts, const Splitter& splitter, int num_threads, WordCounts& counts,
                 const std::function<void(size_t, size_t)>& refuse);

// A line that is left to the caller: its number (the first of all has 0) and where it is.
struct OtherLine {
  uint64_t number;
  std::string_view line;
};

// The same with the texts under `key` of JSON lines, each ended by "\n" and whole within one of the blocks. Returns the
// lines that json_lines.h does not read, in order; their words are not counted. num_lines: set to how many there were.
std::vector<OtherLine> count_json_lines(const std::vector<std::string_view>& blocks, std::string_view key,
                                        const Splitter& splitter, int num_threads, WordCounts& counts,
                                        uint64_t& num_lines);

}  // namespace herdkern::text
