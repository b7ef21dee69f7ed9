// The ids of a word in linear time. A row of tokens is what the merges of BPE leave exactly if every two neighbours are
// what they leave of the two tokens' bytes. So tokens are laid from the left: the longest that the text begins with is
// tried first, a shorter one when it does not go with the token before it or when nothing could follow; a border once
// found to be no border is never tried again, which bounds the work. There is one such row, whatever is tried first.
//
// Whether two tokens go together is seen by undoing their merges at the border between them, the last merge first: if
// at some moment the two parts beside the border make a token of a lower rank than the merge undone, BPE would have
// made that one instead. Merges of one rank happen from left to right. The answer depends on the two tokens alone, so
// each thread remembers those it met lately.
//
// The rule holds for tokens that are made by two of lower rank, as those of every trained vocabulary are. Others can
// only be whole words, unless parts of a higher rank make them (is_regular() is false then: merge).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "text/bpe_tables.h"
#include "text/bpe_word_merge.h"
#include "text/id_buffer.h"

namespace herdkern::text {

class TokenRows {
 public:
  // What one thread keeps from word to word.
  struct Scratch {
    std::vector<uint64_t> borders;  // a pair of ids and whether they go together, at the place of their hash
    std::vector<uint64_t> dead;     // bit i: no token border can be before byte i
  };

  // table, bytes: of the same tokens; they must outlive this.
  TokenRows(const TokenList& tokens, const TokenTable& table, const ByteTokens& bytes);
  bool is_regular() const { return is_regular_; }
  const std::vector<TokenParts>& parts() const { return parts_; }  // by id
  // Appends the ids of the word, which must not be a token as a whole; 16 bytes behind it must be readable. False, and
  // nothing appended, if no row of tokens fits.
  bool encode(const uint8_t* word, size_t len, Scratch& scratch, IdBuffer& out) const;

 private:
  struct Token {
    uint32_t id, len;  // len 0: none
  };

  template <typename Dead>
  bool lay(const uint8_t* word, size_t len, Dead&& dead, uint64_t* borders, IdBuffer& out) const;
  // The longest token that `text` begins with, of at most `most` bytes.
  Token longest_at(const uint8_t* text, size_t most) const;
  // The longest one that a token's text begins with and that is not the token.
  Token shorter_than(Token token, const uint8_t* text) const {
    return token.len > kShortKey ? shorter_[token.id] : longest_at(text, token.len - 1);
  }
  // The token before `text` if the text goes on with the same bytes, else none; of long tokens alone. It is tried
  // first: a run of one sign has many tokens, of which those longer than the one that repeats lead nowhere.
  static Token comes_again(Token last, const uint8_t* text, size_t most) {
    const bool is_same = last.len > kShortKey && last.len <= most && std::memcmp(text - last.len, text, last.len) == 0;
    return is_same ? last : Token{0, 0};
  }
  // limit: tokens from this rank on do not count.
  bool go_together(Token first, Token second, const uint8_t* border, uint32_t limit) const;
  bool remembered(uint64_t* borders, Token first, Token second, const uint8_t* border) const;
  bool is_made(Token token) const { return token.len == 1 || parts_[token.id].left != kNoToken; }
  uint32_t find(const uint8_t* bytes, size_t len) const {
    return len == 1 ? bytes_.one(*bytes) : len == 2 ? bytes_.pair(bytes[0], bytes[1]) : table_.find(bytes, len);
  }
  void add(const uint8_t* bytes, Token token);

  const TokenTable& table_;
  const ByteTokens& bytes_;
  std::vector<TokenParts> parts_;
  std::vector<Token> shorter_;  // by id, for tokens that are no short keys
  // By a hash of the first bytes, one bit for each length of a token that begins so: of 4 to 7; of 8 to 15, bit 0:
  // more.
  std::vector<uint8_t> begin_of_4_;
  std::vector<uint16_t> begin_of_8_;
  bool is_regular_ = true;
};

}  // namespace herdkern::text
