// Cutting texts into parts that threads encode on their own, with the same ids whatever the number of parts.
//
// Where a word begins, the words that follow depend on the text behind alone. So a part may begin anywhere: once it and
// the part before it, which goes on a few words past its end, have a border of words in common, all behind is the same.
// A part notes its first borders and those behind its end; joining compares them. Texts in which two parts find no
// common border (there is no such border, or it is far) are encoded again as a whole.
#pragma once
#include <cstddef>
#include <memory>
#include <string_view>
#include <vector>

#include "text/any_text.h"
#include "text/bpe_special.h"

namespace herdkern::text {

struct TextPart {
  // Where a word ends, and how many ids the part has up to there.
  struct Border {
    size_t place, num_ids;
  };
  static constexpr size_t kBorders = 16;     // noted at each end
  static constexpr size_t kBytes = 1 << 17;  // of a part, about

  size_t first_text, last_text;  // all of the texts [first, last), or bytes [begin, end) of one
  size_t group;                  // the first of the parts of the same text, or this one
  bool is_cut = false;           // bytes of a text
  size_t begin = 0, end = 0;
  // Whether begin or end is a guess; what lies between two special tokens around begin, and around end.
  bool is_open_begin = false, is_open_end = false;
  size_t run_begin = 0, next_run_end = 0;
  std::vector<Border> head{}, tail{};
  size_t first_id = 0, last_id = 0;  // those that count
};

// What to encode. part_bytes: texts of four times as much are cut; tests make it small.
struct Texts {
  std::vector<AnyText> views;
  SpecialPolicy special, forbidden;
  size_t part_bytes = TextPart::kBytes;
  std::vector<std::unique_ptr<Utf8Buffer>> long_ones = {};  // UTF-8 of texts that were cut, which their views show then
};

// A text holds a forbidden special token.
struct ForbiddenToken {};

// Runs of short texts and parts of long ones, in order. can_cut: words depend on the text behind their begin alone.
// Throws ForbiddenToken or LoneSurrogate for a text that it cuts.
std::vector<TextPart> cut_into_parts(Texts& texts, const SpecialTokens& special, bool can_cut);

// Sets first_id and last_id of the parts [first, last) of one text. False if two have no border in common.
bool join_parts(std::vector<TextPart>& parts, size_t first, size_t last);

}  // namespace herdkern::text
