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
#include <string_view>
#include <vector>

#include "text/bpe_tables.h"
#include "text/unicode_split.h"

namespace herdkern::text {

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
