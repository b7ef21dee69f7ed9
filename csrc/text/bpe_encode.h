// Byte-pair encoding with ranks: a word that is a token becomes that token; else the adjacent pair whose joined bytes
// have the lowest rank is merged, the leftmost first, until no pair is a token. These are tiktoken's rules, id for id.
// A rank is the token's id. Encoding takes O(n log n) for a word of n bytes. Threads share nothing but read-only
// tables; each borrows a word cache of fixed size, which changes speed and never ids.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "text/unicode_split.h"
#include "text/word_key.h"

namespace herdkern::text {

constexpr uint32_t kNoToken = 0xFFFFFFFF;
constexpr uint32_t kMaxTokens = 1 << 21;  // ids must be smaller: a pair and its rank share one 64-bit slot

using TokenList = std::vector<std::pair<std::string, uint32_t>>;  // (bytes, id)

// A growing array of ids that leaves new memory unwritten.
class IdBuffer {
 public:
  // Room for n more ids behind the last one; call grow_by after writing them.
  uint32_t* room_for(size_t n) {
    if (size_ + n > capacity_) reserve(std::max(size_ + n, capacity_ + capacity_ / 2 + 64));
    return ids_.get() + size_;
  }
  void grow_by(size_t n) { size_ += n; }
  void push(uint32_t id) {
    *room_for(1) = id;
    grow_by(1);
  }
  void clear() { size_ = 0; }
  size_t size() const { return size_; }
  const uint32_t* data() const { return ids_.get(); }
  std::unique_ptr<uint32_t[]> release() { return std::move(ids_); }

 private:
  void reserve(size_t capacity) {
    std::unique_ptr<uint32_t[]> fresh(new uint32_t[capacity]);
    if (size_ != 0) std::memcpy(fresh.get(), ids_.get(), size_ * sizeof(uint32_t));
    ids_ = std::move(fresh);
    capacity_ = capacity;
  }
  std::unique_ptr<uint32_t[]> ids_;
  size_t size_ = 0, capacity_ = 0;
};

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

// Which special tokens become their ids; the others are text like any other.
struct SpecialPolicy {
  bool all = false;
  std::vector<uint32_t> ids;  // sorted; used when not all
  bool none() const { return !all && ids.empty(); }
};

class Encoder {
 public:
  // `tokens` must hold the 256 single bytes, each id once, each byte string once; the caller checks.
  Encoder(const TokenList& tokens, const TokenList& special_tokens);
  ~Encoder();

  void encode(std::string_view text, const SpecialPolicy& policy, IdBuffer& out) const;
  // ids of texts[i] are out[offsets[i] .. offsets[i + 1]).
  void encode_batch(const std::vector<std::string_view>& texts, const SpecialPolicy& policy, int num_threads,
                    IdBuffer& out, int64_t* offsets) const;
  // The tokens that a token's bytes become when only lower ids may be used: two for an ordinary merge.
  std::vector<uint32_t> parts_of(std::string_view bytes, uint32_t id) const;
  const SpecialTokens& special_tokens() const { return special_; }

 private:
  struct Worker;  // word cache and scratch of one thread
  class BorrowedWorker;

  void encode_ordinary(std::string_view text, Worker& worker, IdBuffer& out) const;
  void encode_with(std::string_view text, const SpecialPolicy& policy, Worker& worker, IdBuffer& out) const;
  void encode_word(const uint8_t* word, size_t len, const uint8_t* end, Worker& worker, IdBuffer& out) const;
  void merge_short(const uint8_t* word, size_t len, uint32_t limit, IdBuffer& out) const;
  void merge_long(const uint8_t* word, size_t len, uint32_t limit, Worker& worker, IdBuffer& out) const;

  WordScanner scanner_;
  TokenTable table_;
  PairTable pairs_;
  SpecialTokens special_;
  uint32_t byte_ids_[256];
  std::vector<uint32_t> byte_pairs_;  // (256 * 256,) rank of two bytes
  mutable std::mutex idle_mutex_;
  mutable std::vector<std::unique_ptr<Worker>> idle_;
};

}  // namespace herdkern::text
