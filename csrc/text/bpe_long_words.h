// Long words in linear time. A row of tokens is what the merges of BPE leave exactly if every two neighbours are what
// they leave of the two tokens' bytes. So tokens are laid from the left: the longest that the text begins with is tried
// first, a shorter one when it does not go with the token before it or when nothing could follow; a border once found
// to be no border is never tried again, which bounds the work.
//
// Whether two tokens go together is seen by undoing their merges at the border between them, the last merge first: if
// at some moment the two parts beside the border make a token of a lower rank than the merge undone, BPE would have
// made that one instead. Merges of one rank happen from left to right.
//
// The rule holds for tokens that are made by two of lower rank, as those of every trained vocabulary are. Others can
// only be whole words, unless parts of a higher rank make them (is_regular() is false then: use the heap).
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "text/bpe_word.h"

namespace herdkern::text {

class LongWords {
 public:
  explicit LongWords(const WordEncoder& encoder);
  bool is_regular() const { return is_regular_; }
  // Appends the ids of the word, which must not be a token as a whole; 16 bytes behind it must be readable. False, and
  // nothing appended, if no row of tokens fits.
  bool encode(const uint8_t* word, size_t len, WordEncoder::Scratch& scratch, IdBuffer& out) const;

 private:
  struct Token {
    uint32_t id, len;  // len 0: none
  };
  struct Parts {
    uint32_t left, right;  // ids; kNoToken: it is not made of two
  };
  static constexpr uint64_t kUnknown = ~uint64_t(0);

  // The longest token at `text` that is shorter than `below` bytes.
  Token shorter_than(size_t below, const uint8_t* text, size_t left) const;
  bool go_together(Token first, Token second, const uint8_t* border) const;
  Parts parts_of(uint32_t id, const uint8_t* bytes, size_t len) const;
  bool is_made(uint32_t id, const uint8_t* bytes, size_t len) const {
    return len <= 2 || parts_of(id, bytes, len).left != kNoToken;
  }
  bool has_higher_parts(const uint8_t* bytes, size_t len, uint32_t id) const;
  static size_t prefix_slot(const uint8_t* bytes) {
    return ((bytes[0] | bytes[1] << 8 | uint32_t(bytes[2]) << 16) * 0x9E3779B1u) >> 16;
  }

  const WordEncoder& encoder_;
  const TokenTable& table_;
  std::vector<uint16_t>
      prefix_lengths_;  // hash of 3 bytes -> bit n: a token of n bytes begins so; bit 0: of 16 or more
  std::unique_ptr<std::atomic<uint64_t>[]> parts_;  // by id: left << 32 | right, found when first needed
  bool is_regular_ = true;
};

}  // namespace herdkern::text
