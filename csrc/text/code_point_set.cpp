// Sets of code points: see code_point_set.h.
#include "text/code_point_set.h"

#include <algorithm>
#include <cctype>
#include <iterator>

#include "text/unicode_sets.h"

namespace herdkern::text {

void CodePointSet::add(uint32_t first, uint32_t last) {
  if (!ranges_.empty() && first > ranges_.back().last + 1) {
    ranges_.push_back({first, last});
    return;
  }
  auto begin = std::lower_bound(ranges_.begin(), ranges_.end(), first,
                                [](const Range& range, uint32_t c) { return range.last + 1 < c; });
  auto end = begin;
  for (; end != ranges_.end() && end->first <= last + 1; ++end) {
    first = std::min(first, end->first);
    last = std::max(last, end->last);
  }
  begin = ranges_.erase(begin, end);
  ranges_.insert(begin, {first, last});
}

void CodePointSet::add(const CodePointSet& other) {
  for (const Range& range : other.ranges_) add(range.first, range.last);
}

CodePointSet CodePointSet::complement() const {
  CodePointSet result;
  uint32_t next = 0;
  for (const Range& range : ranges_) {
    if (range.first > next) result.ranges_.push_back({next, range.first - 1});
    next = range.last + 1;
  }
  if (next < kNumCodePoints) result.ranges_.push_back({next, kNumCodePoints - 1});
  return result;
}

void CodePointSet::keep(const CodePointSet& other) {
  CodePointSet outside = complement();
  outside.add(other.complement());
  *this = outside.complement();
}

bool CodePointSet::contains(uint32_t code_point) const {
  const auto found = std::lower_bound(ranges_.begin(), ranges_.end(), code_point,
                                      [](const Range& range, uint32_t c) { return range.last < c; });
  return found != ranges_.end() && found->first <= code_point;
}

CodePointSet CodePointSet::with_case_variants() const {
  CodePointSet result = *this;
  for (const CaseRange& cases : kCaseRanges) {
    for (const Range& range : ranges_) {
      if (range.last < cases.first || range.first > cases.last) continue;
      uint32_t first = std::max(range.first, cases.first), last = std::min(range.last, cases.last);
      first += (cases.step - (first - cases.first) % cases.step) % cases.step;
      if (first > last) continue;
      if (cases.step == 1) {
        result.add(first + uint32_t(cases.delta), last + uint32_t(cases.delta));
      } else {
        for (uint32_t c = first; c <= last; c += cases.step) {
          result.add(c + uint32_t(cases.delta), c + uint32_t(cases.delta));
        }
      }
    }
  }
  return result;
}

namespace {

// Adds the code points of every category whose name `wanted` accepts.
template <typename Wanted>
CodePointSet categories(const Wanted& wanted) {
  CodePointSet result;
  uint32_t next = 0;
  for (const uint16_t run : kCategoryRuns) {
    if (wanted(std::string_view(kCategoryNames[run & 31]))) result.add(next, next + (run >> 5) - 1);
    next += run >> 5;
  }
  return result;
}

CodePointSet category(std::string_view name) {
  return categories([name](std::string_view own) { return own.substr(0, name.size()) == name; });
}

struct LongName {
  const char *name, *category;
};
constexpr LongName kLongNames[] = {
    {"OTHER", "C"},
    {"LETTER", "L"},
    {"MARK", "M"},
    {"NUMBER", "N"},
    {"PUNCTUATION", "P"},
    {"PUNCT", "P"},
    {"SYMBOL", "S"},
    {"SEPARATOR", "Z"},
    {"UNASSIGNED", "Cn"},
    {"CONTROL", "Cc"},
    {"CNTRL", "Cc"},
    {"FORMAT", "Cf"},
    {"PRIVATEUSE", "Co"},
    {"SURROGATE", "Cs"},
    {"LOWERCASELETTER", "Ll"},
    {"MODIFIERLETTER", "Lm"},
    {"OTHERLETTER", "Lo"},
    {"TITLECASELETTER", "Lt"},
    {"UPPERCASELETTER", "Lu"},
    {"SPACINGMARK", "Mc"},
    {"ENCLOSINGMARK", "Me"},
    {"NONSPACINGMARK", "Mn"},
    {"DECIMALNUMBER", "Nd"},
    {"DIGIT", "Nd"},
    {"LETTERNUMBER", "Nl"},
    {"OTHERNUMBER", "No"},
    {"CONNECTORPUNCTUATION", "Pc"},
    {"DASHPUNCTUATION", "Pd"},
    {"CLOSEPUNCTUATION", "Pe"},
    {"FINALPUNCTUATION", "Pf"},
    {"INITIALPUNCTUATION", "Pi"},
    {"OTHERPUNCTUATION", "Po"},
    {"OPENPUNCTUATION", "Ps"},
    {"CURRENCYSYMBOL", "Sc"},
    {"MODIFIERSYMBOL", "Sk"},
    {"MATHSYMBOL", "Sm"},
    {"OTHERSYMBOL", "So"},
    {"LINESEPARATOR", "Zl"},
    {"PARAGRAPHSEPARATOR", "Zp"},
    {"SPACESEPARATOR", "Zs"},
};

// Upper case without spaces, hyphens and underscores: how the names of properties compare.
std::string plain_name(std::string_view name) {
  std::string plain;
  for (const char c : name) {
    if (c != ' ' && c != '-' && c != '_') plain += char(std::toupper(static_cast<unsigned char>(c)));
  }
  return plain;
}

bool find_script(std::string_view plain, CodePointSet& result) {
  for (const ScriptName& known : kScriptNames) {
    if (plain != known.name) continue;
    uint32_t next = 0;
    for (const uint32_t run : kScriptRuns) {
      if ((run & 255) == known.script) result.add(next, next + (run >> 8) - 1);
      next += run >> 8;
    }
    return true;
  }
  return false;
}

}  // namespace

CodePointSet white_space() {
  return {{9, 13},          {0x20, 0x20},     {0x85, 0x85},     {0xA0, 0xA0},     {0x1680, 0x1680},
          {0x2000, 0x200A}, {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F}, {0x3000, 0x3000}};
}

CodePointSet digits() { return category("Nd"); }

CodePointSet word_characters() {
  CodePointSet result = categories([](std::string_view name) {
    return name[0] == 'L' || name[0] == 'M' || name == "Nl" || name == "Nd" || name == "Pc";
  });
  // Join_Control, and what is Alphabetic without being a letter, mark or letter number: letters in circles and squares.
  for (const auto& [first, last] : {CodePointSet::Range{0x200C, 0x200D},
                                    {0x24B6, 0x24E9},
                                    {0x1F130, 0x1F149},
                                    {0x1F150, 0x1F169},
                                    {0x1F170, 0x1F189}}) {
    result.add(first, last);
  }
  return result;
}

bool find_property(std::string_view name, bool ignore_case, CodePointSet& result) {
  const size_t equals = name.find_first_of("=:");
  const std::string key = equals == name.npos ? "" : plain_name(name.substr(0, equals));
  const std::string value = plain_name(equals == name.npos ? name : name.substr(equals + 1));
  if (key == "SCRIPT" || key == "SC") return find_script(value, result);
  if (!key.empty() && key != "GENERALCATEGORY" && key != "GC") return false;
  std::string wanted;
  for (const LongName& known : kLongNames) {
    if (value == known.name || value == plain_name(known.category)) wanted = known.category;
  }
  if (ignore_case && (wanted == "Lu" || wanted == "Ll" || wanted == "Lt")) wanted = "LC";
  if (value == "LC" || value == "CASEDLETTER" || wanted == "LC") {
    for (const char* cased : {"Lu", "Ll", "Lt"}) result.add(category(cased));
    return true;
  }
  if (!wanted.empty()) {
    result = category(wanted);
    return true;
  }
  if (!key.empty()) return false;
  if (value == "ANY") {
    result.add(0, kNumCodePoints - 1);
    return true;
  }
  if (value == "WHITESPACE" || value == "WSPACE" || value == "SPACE") {
    result = white_space();
    return true;
  }
  return find_script(value, result);
}

}  // namespace herdkern::text
