// A split pattern as a deterministic automaton over classes of code points, made once and then read-only.
//
// It finds the match that Perl's rules prefer (the leftmost; of several the one that the order of alternatives and the
// greed of repeats put first). A state is an ordered list of places in the pattern; what comes after a place that has
// matched is dropped. Whether a match ends is decided with the next code point in hand, which gives lookahead of one
// code point for nothing.
// Linear time: a match is found one pass over the text, but may read on behind its end in vain. After kFreeSteps in
// vain a Memo notes (place, state) pairs that led nowhere, every kMemoStride bytes; no later attempt goes past one.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "text/utf8.h"

namespace herdkern::text {

class RegexDfa {
 public:
  static constexpr size_t kMaxStates = 10000, kMaxClasses = 255;

  // Throws std::invalid_argument for a pattern that parse_regex refuses, that may match nothing, or that needs more
  // than kMaxStates states.
  explicit RegexDfa(std::string_view pattern);

  // What is known of one text; it must not change meanwhile.
  struct Memo {
    std::unordered_set<uint64_t> dead;  // place << 24 | state
    std::vector<uint64_t> candidates;
    size_t prune_at = 1 << 16;       // pairs; then those behind are dropped
    uint64_t num_steps = 0;          // bytes read by all attempts
    void forget() { dead.clear(); }  // before another text
  };

  // The end of the match that starts at p, or null. [begin, end) is the whole text.
  const uint8_t* match(const uint8_t* begin, const uint8_t* p, const uint8_t* end, Memo& memo) const {
    const uint8_t* last = nullptr;
    const uint8_t* q = p;
    uint32_t state = p == begin ? text_start_ : start_;
    for (const uint8_t* free_end = p + kFreeSteps;;) {
      if (q == end) {
        if (table_[state + num_classes_] & 1) last = q;
        break;
      }
      uint32_t num_bytes = 1, cls = *q;
      if (cls < 0x80) {
        cls = ascii_class_[cls];
      } else {
        const DecodedCodePoint c = decode_utf8(q, end);
        cls = class_of(c.code_point);
        num_bytes = c.num_bytes;
      }
      const uint32_t entry = table_[state + cls];
      if (entry & 1) {
        last = q;
        free_end = q + kFreeSteps;
      }
      state = entry >> 1;
      if (state == kDead) break;
      q += num_bytes;
      if (q >= free_end) {
        memo.num_steps += size_t(q - p);
        return match_on({begin, p, end}, q, state, last, memo);
      }
    }
    memo.num_steps += size_t(q - p) + 1;
    return last;
  }

  // The first place from p on where a match may start, judged by one code point; end if there is none.
  const uint8_t* skip_gap(const uint8_t* p, const uint8_t* end) const {
    while (p < end) {
      if (*p < 0x80) {
        if (starts_match_[ascii_class_[*p]]) return p;
        ++p;
      } else {
        const DecodedCodePoint c = decode_utf8(p, end);
        if (starts_match_[class_of(c.code_point)]) return p;
        p += c.num_bytes;
      }
    }
    return p;
  }
  size_t num_states() const { return table_.size() / stride_; }

 private:
  struct Builder;
  static constexpr uint32_t kDead = 0;
  static constexpr ptrdiff_t kFreeSteps = 64, kMemoStride = 16;

  struct Attempt {
    const uint8_t *begin, *p, *end;
  };
  // match() from q in `state` on, with the memo; `last` is the end of the match so far.
  const uint8_t* match_on(const Attempt& attempt, const uint8_t* q, uint32_t state, const uint8_t* last,
                          Memo& memo) const;
  uint32_t class_of(uint32_t code_point) const {
    return classes_[uint32_t(page_of_[code_point >> kPageBits]) << kPageBits | (code_point & ((1u << kPageBits) - 1))];
  }

  static constexpr uint32_t kPageBits = 7;
  std::vector<uint16_t> page_of_;  // by code point >> kPageBits
  std::vector<uint8_t> classes_;   // pages of classes
  std::vector<uint32_t> table_;    // [state + class]: next state << 1 | whether a match ends before this code point
  std::vector<uint8_t> starts_match_;
  uint32_t num_classes_ = 0;                          // the end of the text is the class behind the last
  uint32_t stride_ = 0, start_ = 0, text_start_ = 0;  // states are offsets into table_
  uint8_t ascii_class_[128];
};

}  // namespace herdkern::text
