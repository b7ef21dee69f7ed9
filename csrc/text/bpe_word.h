// The ids of one word: a word that is a token becomes that token; else the adjacent pair whose joined bytes have the
// lowest rank is merged, the leftmost first, until no pair is a token. These are tiktoken's rules, id for id.
//
// Three ways with the same result. Up to 64 bytes: the rank of every pair in an array, the lowest found by vector
// instructions. Longer: tokens are laid from the left, the longest first, each checked against the one before it, which
// is linear in the length (bpe_long_words.h says when that is allowed). Otherwise: a heap of pairs.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "text/bpe_tables.h"
#include "text/id_buffer.h"

namespace herdkern::text {

class LongWords;

class WordEncoder {
 public:
  // Memory that one thread reuses from word to word.
  struct Scratch {
    std::vector<uint8_t> bytes;                        // the word, with room behind it to read 16 bytes anywhere
    std::vector<uint32_t> ids, next, previous, ranks;  // a linked list by the place of a part's first byte
    std::vector<uint64_t> heap;                        // rank << 32 | place; stale when ranks says otherwise
    std::vector<uint64_t> dead;                        // bit i: no token border can be before byte i
    size_t num_long_bytes = 0;                         // in words that a heap has encoded
    void shrink();                                     // gives back what an extreme word has taken
  };

  // `tokens` must hold the 256 single bytes, each id once, each byte string once; the caller checks.
  explicit WordEncoder(const TokenList& tokens);
  ~WordEncoder();

  // Appends the ids of the word. len <= 15: by its key and hash; else those are not looked at.
  void encode(const uint8_t* word, size_t len, ShortKey key, uint64_t hash, Scratch& scratch, IdBuffer& out) const {
    const uint32_t whole = len <= kShortKey ? table_.find_short(key, hash) : table_.find_long(word, len);
    if (whole != kNoToken) return out.push(whole);
    merge(word, len, kNoToken, scratch, out);
  }
  // The tokens that a token's bytes become when only lower ids may be used: two for an ordinary merge.
  std::vector<uint32_t> parts_of(std::string_view bytes, uint32_t id) const;

  const TokenTable& table() const { return table_; }
  uint32_t byte_id(uint8_t byte) const { return byte_ids_[byte]; }
  uint32_t pair_id(uint8_t first, uint8_t second) const { return byte_pairs_[first << 8 | second]; }

 private:
  // By merges alone, those with a rank below `limit`.
  void merge(const uint8_t* word, size_t len, uint32_t limit, Scratch& scratch, IdBuffer& out) const;
  void merge_short(const uint8_t* word, size_t len, uint32_t limit, IdBuffer& out) const;
  void merge_with_heap(const uint8_t* bytes, size_t len, uint32_t limit, Scratch& scratch, IdBuffer& out) const;
  const LongWords& long_words() const;

  TokenTable table_;
  uint32_t byte_ids_[256];
  std::vector<uint32_t> byte_pairs_;                           // (256 * 256,) id of two bytes
  mutable std::atomic<const LongWords*> long_words_{nullptr};  // made when the first are encoded
};

}  // namespace herdkern::text
