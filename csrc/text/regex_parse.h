// The syntax of split patterns: what the patterns of real tokenizers use of Perl's regular expressions.
//
// Alternatives, groups (capturing, (?:..), (?i:..), (?i) up to the end of its group, also with s), classes with \p{..},
// \P{..}, \s \d \w \S \D \W, ranges, nested classes and && (intersection) and -- (difference) as in Rust and Oniguruma,
// the repeats ? * + {m} {m,} {,n} {m,n}, each also lazy (..?) or possessive (..+), ^ and \A (start of the text), $, \z
// and \Z (its very end, as tiktoken's library has it), and lookahead of one code point.
// Refused, because they cannot be matched in one pass over the text: backreferences, lookbehind, word borders, atomic
// groups, longer lookahead, possessive repeats of more than one code point.
#pragma once
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "text/code_point_set.h"

namespace herdkern::text {

struct RegexNode {
  enum Kind {
    kEmpty,
    kSet,        // one code point of `set`
    kLook,       // the next code point is in `set`; at the end of the text true if at_end
    kTextStart,  // only at the start of the text
    kConcat,     // all children, in order
    kAlternate,  // the first child that leads to a match
    kRepeat,     // children[0], min to max times
  };
  enum Greed { kGreedy, kLazy, kPossessive };

  Kind kind = kEmpty;
  CodePointSet set;
  bool at_end = false;
  int min = 0, max = 0;  // max kNoMax: any number
  Greed greed = kGreedy;
  std::vector<std::unique_ptr<RegexNode>> children;

  static constexpr int kNoMax = -1;
  bool may_be_empty() const;
};

// Throws std::invalid_argument that names the construct and its place, in code points from 0.
std::unique_ptr<RegexNode> parse_regex(std::string_view pattern);

}  // namespace herdkern::text
