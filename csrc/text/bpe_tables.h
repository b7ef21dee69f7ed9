// What an encoder looks up: tokens by their bytes, pairs of tokens, special tokens in text, and words seen lately.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "text/word_key.h"

namespace herdkern::text {

constexpr uint32_t kNoToken = 0xFFFFFFFF;
constexpr uint32_t kMaxTokens = 1 << 21;  // ids must be smaller: a pair and its rank share one 64-bit slot

using TokenList = std::vector<std::pair<std::string, uint32_t>>;  // (bytes, id)

// Bytes of a token -> id.
class TokenTable {
 public:
  explicit TokenTable(const TokenList& tokens);
  uint32_t find(const uint8_t* bytes, size_t len, const uint8_t* readable_end) const;
  size_t max_length() const { return max_length_; }

 private:
  static constexpr size_t kInline = 16;
  struct Entry {
    WordKey key{0, 0};  // len <= 16: the bytes; else low = hash, high = offset into long_tokens_
    uint32_t id = kNoToken;
    uint32_t len = 0;
  };
  std::vector<Entry> entries_;
  std::string long_tokens_;
  size_t max_length_ = 0;
};

// (left id, right id) -> id of the token that their bytes make together.
class PairTable {
 public:
  PairTable(const TokenList& tokens, const TokenTable& table);
  uint32_t find(uint32_t left, uint32_t right) const {
    const uint64_t key = uint64_t(left) << 21 | right;
    for (size_t i = home(key);; i = (i + 1) & mask_) {
      if (slots_[i] >> 21 == key) return uint32_t(slots_[i]) & (kMaxTokens - 1);
      if (slots_[i] == kFree) return kNoToken;
    }
  }

 private:
  static constexpr uint64_t kFree = ~uint64_t(0);
  size_t home(uint64_t key) const { return mix(key, 0x9E3779B97F4A7C15ull) & mask_; }
  std::vector<uint64_t> slots_;  // left << 42 | right << 21 | id
  size_t mask_ = 0;
};

// Finds special tokens in text, the leftmost and of those the longest.
class SpecialTokens {
 public:
  struct Match {
    size_t begin, end;
    uint32_t id;
  };
  explicit SpecialTokens(const TokenList& tokens);
  // The first match at or after `from` among the ids in `wanted` (null: all); begin is npos without one.
  Match find(std::string_view text, size_t from, const std::vector<uint32_t>* wanted) const;

 private:
  std::unordered_map<std::string, uint32_t> ids_;
  std::vector<size_t> lengths_;  // falling
  std::string prefix_;           // common to all
  bool starts_[256] = {};        // first bytes
};

// Words seen lately with their ids. Two-way buckets of one cache line an entry; the older entry of a bucket is
// replaced.
class WordCache {
 public:
  static constexpr size_t kMaxBytes = 32, kMaxIds = 7;
  struct Entry {
    uint64_t key[4];  // the word, padded with zeros
    uint32_t ids[kMaxIds];
    uint8_t len, num_ids;  // len 0: free
  };
  static_assert(sizeof(Entry) == 64);

  // calloc: pages of the cache that no word reaches cost nothing.
  WordCache() : entries_(static_cast<Entry*>(std::calloc(2 * kBuckets, sizeof(Entry))), &std::free) {
    if (entries_ == nullptr) throw std::bad_alloc();
  }

  static void make_key(const uint8_t* word, size_t len, const uint8_t* end, uint64_t key[4]) {
    const WordKey first = load_key(word, std::min<size_t>(len, 16), end);
    const WordKey second = len > 16 ? load_key(word + 16, len - 16, end) : WordKey{0, 0};
    key[0] = first.low, key[1] = first.high, key[2] = second.low, key[3] = second.high;
  }
  static size_t bucket_of(const uint64_t key[4], size_t len) {
    uint64_t hash = mix(key[0] ^ 0x9E3779B97F4A7C15ull, key[1] ^ 0xD1B54A32D192ED03ull ^ len);
    if (len > 16) hash ^= mix(key[2] ^ 0xE7037ED1A0B428DBull, key[3] ^ 0x8EBC6AF09C88C6E3ull);
    return (hash ^ hash >> 29) & (kBuckets - 1);
  }
  void prefetch(size_t bucket) const {
    __builtin_prefetch(&entries_[2 * bucket]);
    __builtin_prefetch(&entries_[2 * bucket + 1]);
  }
  const Entry* find(const uint64_t key[4], size_t len, size_t bucket) const {
    const Entry* entry = &entries_[2 * bucket];
    for (int way = 0; way < 2; ++way, ++entry) {
      if (entry->len != len || entry->key[0] != key[0] || entry->key[1] != key[1]) continue;
      if (len <= 16 || (entry->key[2] == key[2] && entry->key[3] == key[3])) return entry;
    }
    return nullptr;
  }
  void insert(const uint64_t key[4], size_t len, size_t bucket, const uint32_t* ids, size_t num_ids) {
    if (num_ids > kMaxIds) return;
    Entry* entry = &entries_[2 * bucket];
    entry[1] = entry[0];
    std::copy(key, key + 4, entry->key);
    std::copy(ids, ids + num_ids, entry->ids);
    entry->len = uint8_t(len);
    entry->num_ids = uint8_t(num_ids);
  }

 private:
  static constexpr size_t kBuckets = 1 << 16;  // 8 MiB
  std::unique_ptr<Entry[], decltype(&std::free)> entries_;
};

}  // namespace herdkern::text
