// Merging within short words, for tokens that are each made of two of lower rank (bpe_rows.h says "regular").
//
// A token then comes from one pair of tokens alone, so pairs are looked up by their two ids: a key of 8 bytes instead
// of 16. What a merge waits for is memory, so a filter that stays in the nearer caches says of nine in ten pairs that
// they are none; those ask for a bucket that is always near.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "text/bpe_tables.h"
#include "text/bpe_word_starts.h"
#include "text/huge_array.h"

namespace herdkern::text {

// The two tokens that a token is merged from; kNoToken: it is not.
struct TokenParts {
  uint32_t left = kNoToken, right = kNoToken;
};

class MergeTable {
 public:
  static constexpr size_t kSlots = 4;
  static constexpr int kIdBits = 21;
  static constexpr uint64_t kIdMask = (1u << kIdBits) - 1;
  static_assert(kMaxTokens == 1u << kIdBits);

  struct alignas(32) Bucket {
    uint64_t slots[kSlots];  // key << kIdBits | id; 0: free, and so are those behind
  };

  MergeTable() = default;
  // parts: by id. `bytes` must outlive this.
  MergeTable(const std::vector<TokenParts>& parts, const ByteTokens& bytes);

  // No pair of tokens has the key of another, or 0; the id of no token has all bits set.
  static uint64_t key_of(uint32_t left, uint32_t right) {
    return (uint64_t(left & kIdMask) << kIdBits | (right & kIdMask)) + 1;
  }
  static uint64_t hash_of(uint64_t key) { return key * 0x9E3779B97F4A7C15ull; }
  // All bits set, or none if no token is made of the pair with this hash.
  uint64_t filter(uint64_t hash) const {
    const uint64_t place = hash >> filter_shift_;
    return 0 - (filter_[place >> 6] >> (place & 63) & 1);
  }
  const Bucket& bucket(uint64_t hash, uint64_t filter) const { return buckets_[hash >> shift_ & filter]; }
  // The token made of two, slot by slot; kNoToken if there is none.
  uint32_t find(uint64_t key) const;
  const ByteTokens& bytes() const { return *bytes_; }

 private:
  HugeArray<Bucket> buckets_;
  HugeArray<uint64_t> filter_;
  int shift_ = 0, filter_shift_ = 0;
  const ByteTokens* bytes_ = nullptr;
};

constexpr size_t kMergedAtOnce = 62;                  // parts of a word that merging starts from
constexpr size_t kLongestMerged = 3 * kMergedAtOnce;  // bytes: more are more parts
constexpr size_t kReadAtOnce = 64, kReadBehind = 4;

// Writes the ids of the word, of 2 to kLongestMerged bytes, which is no token as a whole; returns how many, 0 if it has
// too many parts. kReadAtOnce bytes at `word` must be readable, and kReadBehind behind its end, and room for
// kMergedAtOnce ids at `out`.
using MergeWord = size_t (*)(const MergeTable& table, const WordStarts& starts, const uint8_t* word, size_t len,
                             uint32_t* out);

// The best one that this processor runs. HERDKERN_ISA forces a lower level.
MergeWord find_merge_word();

#define HK_DECLARE_MERGE_WORD(level)                                                                    \
  namespace level {                                                                                     \
  size_t merge_word(const MergeTable& table, const WordStarts& starts, const uint8_t* word, size_t len, \
                    uint32_t* out);                                                                     \
  }
HK_DECLARE_MERGE_WORD(baseline)
#if defined(HK_X86)
HK_DECLARE_MERGE_WORD(avx2)
HK_DECLARE_MERGE_WORD(avx512)
#endif
#undef HK_DECLARE_MERGE_WORD

}  // namespace herdkern::text
