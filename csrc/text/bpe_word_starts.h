// What the merging within a word may start from instead of its bytes: for most code points, the tokens that the merges
// make of the code point's bytes alone.
//
// Why that is exact. Merges are made in the order of their ranks. The merges inside a code point come before all
// others that touch its bytes, unless some token reaches over one of its two borders, is made of the part that is at
// that border at the time, and has a rank no higher than the merge inside that is next. Whether there is such a token
// follows from the vocabulary and from the byte on the other side of the border. So each code point has a list of bytes
// beside which it starts from its bytes; beside all others it may start from its own tokens, whatever its neighbours
// start from. A space and the code point behind it are taken together where a word begins with them: the space is what
// most such tokens begin with.
//
// The same holds for two bytes: they are joined before everything else that touches them if no token over one of their
// borders has a rank as low. In ASCII half of all merges are such (of the pairs whose rank is lower than those of both
// neighbours, 19 in 20), and they are known at once.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "text/bpe_tables.h"
#include "text/huge_array.h"

namespace herdkern::text {

class MergeTable;
struct TokenParts;

class WordStarts {
 public:
  struct alignas(16) Start {
    uint32_t ids[3];
    uint32_t notes;  // kNumIds: how many; above them a bit for each class of bytes beside which they are not sure
  };
  static constexpr uint32_t kNumIds = 3;
  static constexpr int kRankBits = 21;
  static constexpr uint64_t kNoRank = (1u << kRankBits) - 1;
  static constexpr uint32_t kNoByte = 256;  // the word begins or ends here

  WordStarts() = default;
  // Of tokens that are regular (bpe_rows.h). parts: by id.
  WordStarts(const TokenList& tokens, const std::vector<TokenParts>& parts, const TokenTable& table,
             const MergeTable& merges);

  // place: of a code point of two or three bytes, itself; of another byte, place_of_byte.
  const Start& start(uint32_t place) const { return starts_[place]; }
  const Start& start_behind_space(uint32_t place) const { return starts_[kPlaces + place]; }
  // ASCII, or a byte that begins no code point of two or three bytes. No code point lies behind 0xD7FF for a while.
  static uint32_t place_of_byte(uint32_t byte) { return byte < 0x80 ? byte : 0xD800 | byte; }
  // The bits of notes for the byte before and the one behind.
  uint32_t before(uint32_t byte) const { return before_[byte]; }
  uint32_t behind(uint32_t byte) const { return behind_[byte]; }
  // Two bytes of ASCII: the rank of the token that they make; the lowest of the tokens that end with the second as a
  // part behind the first, and of those that begin with the first as a part before the second; kNoRank: none. Only the
  // lowest bits of what is behind the word are looked at, whatever it is.
  uint64_t ascii_pair(uint8_t first, uint8_t second) const { return ascii_pairs_[(first & 127) << 7 | (second & 127)]; }

 private:
  void add_ascii_pairs(const TokenList& tokens, const std::vector<TokenParts>& parts, const TokenTable& table);
  static constexpr uint32_t kPlaces = 1 << 16;
  HugeArray<Start> starts_;
  std::vector<uint64_t> ascii_pairs_;
  std::array<uint32_t, 257> before_{}, behind_{};
};

}  // namespace herdkern::text
