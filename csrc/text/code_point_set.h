// Sets of code points, as sorted ranges: what the classes of a split pattern stand for.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace herdkern::text {

constexpr uint32_t kNumCodePoints = 0x110000;  // surrogates included: a malformed byte b counts as U+DC00 + b

class CodePointSet {
 public:
  struct Range {
    uint32_t first, last;
    bool operator==(const Range& other) const { return first == other.first && last == other.last; }
  };

  CodePointSet() = default;
  CodePointSet(std::initializer_list<Range> ranges) {
    for (const Range& range : ranges) add(range.first, range.last);
  }

  void add(uint32_t first, uint32_t last);
  void add(const CodePointSet& other);
  void keep(const CodePointSet& other);  // intersection
  CodePointSet complement() const;
  // With the case variants of every member, as (?i) of the `regex` package knows them: simple folding, and i, I, U+0130
  // and U+0131 as pairs of Turkish.
  CodePointSet with_case_variants() const;

  const std::vector<Range>& ranges() const { return ranges_; }
  bool empty() const { return ranges_.empty(); }
  bool contains(uint32_t code_point) const;
  bool operator==(const CodePointSet& other) const { return ranges_ == other.ranges_; }

 private:
  std::vector<Range> ranges_;  // sorted, disjoint, not adjacent
};

CodePointSet white_space();      // \s, the property White_Space
CodePointSet digits();           // \d, the category Nd
CodePointSet word_characters();  // \w, of UTS 18: Alphabetic, M, Nd, Pc, Join_Control
// The set of \p{name}: a general category by its short or long name, or a script. False if there is none of that name.
// With ignore_case Lu, Ll and Lt each stand for all three.
bool find_property(std::string_view name, bool ignore_case, CodePointSet& result);

}  // namespace herdkern::text
