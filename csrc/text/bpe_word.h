// The ids of one word: a word that is a token becomes that token; else the adjacent pair whose joined bytes have the
// lowest rank is merged, the leftmost first, until no pair is a token. These are tiktoken's rules, id for id.
//
// Three ways with the same result. Up to 62 bytes, or as many parts that code points are sure to become
// (bpe_word_starts.h): the rank of every pair in vectors, the lowest merged (bpe_word_merge.h). Longer: tokens are laid
// in a row from the left, the longest first, each checked against the one before it, which is linear in the length.
// Otherwise, and for tokens that do not allow these two (bpe_rows.h says which): the same as the first by bytes, or a
// heap of pairs. Tried: rows for short words too: they look at more tokens that are in no cache, English and Hindi lose
// a tenth.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "text/bpe_rows.h"
#include "text/bpe_tables.h"
#include "text/bpe_word_merge.h"
#include "text/bpe_word_starts.h"
#include "text/id_buffer.h"

namespace herdkern::text {

class WordEncoder {
 public:
  // Memory that one thread reuses from word to word.
  struct Scratch {
    TokenRows::Scratch rows;
    std::vector<uint8_t> bytes;                        // the word, with room behind it to read 16 bytes anywhere
    std::vector<uint32_t> ids, next, previous, ranks;  // a linked list by the place of a part's first byte
    std::vector<uint64_t> heap;                        // rank << 32 | place; stale when ranks says otherwise
    void shrink();                                     // gives back what an extreme word has taken
  };

  // `tokens` must hold the 256 single bytes, each id once, each byte string once; the caller checks.
  explicit WordEncoder(const TokenList& tokens);
  WordEncoder(const WordEncoder&) = delete;

  // Appends the ids of the word. len <= 15: by its key and hash; else those are not looked at. Nothing is read from
  // `readable_end` on.
  void encode(const uint8_t* word, size_t len, ShortKey key, uint64_t hash, const uint8_t* readable_end,
              Scratch& scratch, IdBuffer& out) const;
  // The tokens that a token's bytes become when only lower ids may be used: two for an ordinary merge.
  std::vector<uint32_t> parts_of(std::string_view bytes, uint32_t id) const;

  const TokenTable& table() const { return table_; }

 private:
  // By merges alone, those with a rank below `limit`.
  void merge(const uint8_t* word, size_t len, uint32_t limit, Scratch& scratch, IdBuffer& out) const;
  void merge_short(const uint8_t* word, size_t len, uint32_t limit, IdBuffer& out) const;
  void merge_with_heap(const uint8_t* word, size_t len, uint32_t limit, Scratch& scratch, IdBuffer& out) const;

  TokenTable table_;
  ByteTokens bytes_;
  TokenRows rows_;
  MergeTable merges_;  // empty if rows_ is not regular, as is starts_
  WordStarts starts_;
  MergeWord merge_word_;
};

}  // namespace herdkern::text
