// The parser of split patterns: see regex_parse.h.
#include "text/regex_parse.h"

#include <algorithm>
#include <cctype>

#include "text/utf8.h"

namespace herdkern::text {

namespace {

using Node = std::unique_ptr<RegexNode>;

constexpr int kMaxRepeat = 1000, kMaxDepth = 200;
constexpr size_t kMaxLength = 20000;
constexpr uint32_t kEnd = ~0u;  // behind the last code point of the pattern

struct Flags {
  bool ignore_case = false, dot_all = false;
};

Node make_node(RegexNode::Kind kind) {
  auto node = std::make_unique<RegexNode>();
  node->kind = kind;
  return node;
}

Node set_node(CodePointSet set) {
  Node node = make_node(RegexNode::kSet);
  node->set = std::move(set);
  return node;
}

class Parser {
 public:
  explicit Parser(std::string_view pattern) {
    const auto* p = reinterpret_cast<const uint8_t*>(pattern.data());
    for (const uint8_t* end = p + pattern.size(); p < end;) {
      const DecodedCodePoint c = decode_utf8(p, end);
      text_.push_back(c.code_point);
      p += c.num_bytes;
    }
  }

  Node parse() {
    if (text_.size() > kMaxLength) fail("more than " + std::to_string(kMaxLength) + " characters", kMaxLength);
    Node node = alternatives(Flags(), 0);
    if (peek() == ')') fail("an unbalanced ')'", at_);
    return node;
  }

 private:
  [[noreturn]] static void fail(const std::string& what, size_t place) {
    throw std::invalid_argument("must be a pattern that can be matched in one pass, got " + what + " at character " +
                                std::to_string(place));
  }

  uint32_t peek(size_t ahead = 0) const { return at_ + ahead < text_.size() ? text_[at_ + ahead] : kEnd; }
  bool take(uint32_t c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }
  bool take(std::string_view word) {
    for (size_t i = 0; i < word.size(); ++i) {
      if (peek(i) != uint8_t(word[i])) return false;
    }
    at_ += word.size();
    return true;
  }

  Node alternatives(Flags flags, int depth) {
    if (depth > kMaxDepth) fail("groups nested too deeply", at_);
    std::vector<Node> branches;
    do {
      Node branch = make_node(RegexNode::kConcat);
      while (peek() != kEnd && peek() != '|' && peek() != ')') {
        if (!take_flags(flags)) branch->children.push_back(repeated(flags, depth));
      }
      branches.push_back(branch->children.size() == 1 ? std::move(branch->children[0]) : std::move(branch));
    } while (take('|'));
    if (branches.size() == 1) return std::move(branches[0]);
    Node node = make_node(RegexNode::kAlternate);
    node->children = std::move(branches);
    return node;
  }

  // (?i), (?s), (?-i) and so on: from here to the end of the group.
  bool take_flags(Flags& flags) {
    const size_t before = at_;
    Flags changed = flags;
    if (take("(?") && read_flags(changed) && take(')')) return flags = changed, true;
    at_ = before;
    return false;
  }

  // Letters of flags up to ')' or ':'; false if there is something else.
  bool read_flags(Flags& flags) {
    bool on = true;
    for (; peek() != ')' && peek() != ':'; ++at_) {
      if (peek() == '-' && on) {
        on = false;
      } else if (peek() == 'i') {
        flags.ignore_case = on;
      } else if (peek() == 's') {
        flags.dot_all = on;
      } else if (peek() != 'u') {
        return false;
      }
    }
    return true;
  }

  Node repeated(Flags flags, int depth) {
    const size_t start = at_;
    Node child = atom(flags, depth);
    int min, max;
    const size_t place = at_;
    if (!take_count(min, max)) return child;
    Node node = make_node(RegexNode::kRepeat);
    node->min = min;
    node->max = max;
    node->greed = take('?') ? RegexNode::kLazy : take('+') ? RegexNode::kPossessive : RegexNode::kGreedy;
    if (node->greed == RegexNode::kPossessive && child->kind != RegexNode::kSet) {
      fail("a possessive repeat of more than one code point", place);
    }
    if (max == RegexNode::kNoMax && child->may_be_empty()) fail("an endless repeat of what may match nothing", start);
    if (child->kind == RegexNode::kLook || child->kind == RegexNode::kTextStart) fail("a repeated anchor", place);
    node->children.push_back(std::move(child));
    int again_min, again_max;
    const size_t second = at_;
    if (take_count(again_min, again_max)) fail("a repeat of a repeat", second);
    return node;
  }

  bool take_count(int& min, int& max) {
    if (take('*')) return min = 0, max = RegexNode::kNoMax, true;
    if (take('+')) return min = 1, max = RegexNode::kNoMax, true;
    if (take('?')) return min = 0, max = 1, true;
    const size_t before = at_;
    if (!take('{')) return false;
    const bool has_min = take_number(min);
    max = min;
    bool well_formed = has_min;
    if (take(',')) {
      const bool has_max = take_number(max);
      if (!has_max) max = RegexNode::kNoMax;
      well_formed = has_min || has_max;
    }
    if (!well_formed || !take('}')) {  // then it stands for itself
      at_ = before;
      return false;
    }
    if (max != RegexNode::kNoMax && max < min) fail("a repeat whose least is above its most", before);
    if (std::max(min, max) > kMaxRepeat) fail("a repeat of more than " + std::to_string(kMaxRepeat), before);
    return true;
  }

  // Digits as a number, 0 if there are none.
  bool take_number(int& number) {
    const size_t before = at_;
    number = 0;
    for (; peek() >= '0' && peek() <= '9'; ++at_) number = std::min(number * 10 + int(peek() - '0'), kMaxRepeat + 1);
    return at_ != before;
  }

  Node atom(Flags flags, int depth) {
    const size_t start = at_;
    if (take('(')) return group(flags, depth, start);
    if (take('[')) return set_node(bracket_class(flags, depth, start));
    if (take('.')) {
      return set_node(flags.dot_all ? CodePointSet{{0, kNumCodePoints - 1}} : CodePointSet{{'\n', '\n'}}.complement());
    }
    if (take('^')) return make_node(RegexNode::kTextStart);
    if (take('$')) return text_end();
    if (peek() == '*' || peek() == '+' || peek() == '?') fail("a repeat of nothing", start);
    if (peek() == '\\') {
      if (peek(1) == 'A') return at_ += 2, make_node(RegexNode::kTextStart);
      if (peek(1) == 'z' || peek(1) == 'Z') return at_ += 2, text_end();
    }
    CodePointSet set;
    const uint32_t literal = class_item(flags, set);
    if (literal != kEnd) add_range(set, literal, literal, flags);
    return set_node(std::move(set));
  }

  static Node text_end() {
    Node node = make_node(RegexNode::kLook);
    node->at_end = true;
    return node;
  }

  Node group(Flags flags, int depth, size_t start) {
    bool looks = false, negated = false;
    if (take('?')) {
      if (take("<=") || take("<!")) fail("lookbehind", start);
      if (take('>')) fail("an atomic group", start);
      if (take('=') || take('!')) {
        looks = true;
        negated = text_[at_ - 1] == '!';
      } else if (take("P<") || take('<')) {
        while (peek() != '>' && peek() != kEnd) ++at_;
        if (!take('>')) fail("a group's name without its end", start);
      } else if (peek() == 'P') {
        fail("a backreference", start);
      } else if (!read_flags(flags) || !take(':')) {
        fail("an unknown kind of group", start);
      }
    }
    Node node = alternatives(flags, depth + 1);
    if (!take(')')) fail("a group without its end", start);
    if (!looks) return node;
    Node look = make_node(RegexNode::kLook);
    if (!add_one_code_point(*node, *look)) fail("lookahead of more than one code point", start);
    if (negated) {
      look->set = look->set.complement();
      look->at_end = !look->at_end;
    }
    return look;
  }

  // Adds what `node` says of the next code point to `look`; false if it says more.
  static bool add_one_code_point(const RegexNode& node, RegexNode& look) {
    switch (node.kind) {
      case RegexNode::kSet:
        look.set.add(node.set);
        return true;
      case RegexNode::kLook:
        look.set.add(node.set);
        look.at_end |= node.at_end;
        return true;
      case RegexNode::kAlternate:
        return std::all_of(node.children.begin(), node.children.end(),
                           [&look](const Node& child) { return add_one_code_point(*child, look); });
      case RegexNode::kRepeat:  // one or more: only the first counts
        return node.min == 1 && node.children[0]->kind == RegexNode::kSet &&
               add_one_code_point(*node.children[0], look);
      default:
        return false;
    }
  }

  static void add_range(CodePointSet& set, uint32_t first, uint32_t last, Flags flags) {
    const CodePointSet range{{first, last}};
    set.add(flags.ignore_case ? range.with_case_variants() : range);
  }

  // After '[': the class up to its ']'.
  CodePointSet bracket_class(Flags flags, int depth, size_t start) {
    if (depth > kMaxDepth) fail("classes nested too deeply", start);
    const bool negated = take('^');
    CodePointSet set;
    bool first = true;
    for (; first || peek() != ']'; first = false) {
      if (peek() == kEnd) fail("a class without its end", start);
      const size_t place = at_;
      if (!first && (take("&&") || take("--"))) {
        CodePointSet other = class_operand(flags, depth, start);
        set.keep(text_[place] == '&' ? other : other.complement());
        continue;
      }
      add_item(flags, depth, set);
    }
    ++at_;
    return negated ? set.complement() : set;
  }

  // What follows && or --, up to the next operator or the end of the class.
  CodePointSet class_operand(Flags flags, int depth, size_t start) {
    CodePointSet set;
    while (peek() != ']' && !(peek() == '&' && peek(1) == '&') && !(peek() == '-' && peek(1) == '-')) {
      if (peek() == kEnd) fail("a class without its end", start);
      add_item(flags, depth, set);
    }
    return set;
  }

  void add_item(Flags flags, int depth, CodePointSet& set) {
    const size_t place = at_;
    if (peek() == '[') {
      if (peek(1) == ':') fail("a POSIX class", place);
      ++at_;
      return set.add(bracket_class(flags, depth + 1, place));
    }
    const uint32_t first = class_item(flags, set);
    if (first == kEnd) return;
    uint32_t last = first;
    if (peek() == '-' && peek(1) != ']' && peek(1) != '-' && peek(1) != kEnd) {
      ++at_;
      CodePointSet ignored;
      last = class_item(flags, ignored);
      if (last == kEnd || last < first) fail("a range whose end is no code point above its start", place);
    }
    add_range(set, first, last, flags);
  }

  // One code point, which is returned, or an escaped class, which is added to `set` (kEnd is returned).
  uint32_t class_item(Flags flags, CodePointSet& set) {
    const size_t place = at_;
    const uint32_t c = text_[at_++];
    if (c != '\\') return c;
    if (at_ == text_.size()) fail("a lone backslash", place);
    const uint32_t escaped = text_[at_++];
    switch (escaped) {
      case 'n':
        return '\n';
      case 'r':
        return '\r';
      case 't':
        return '\t';
      case 'f':
        return '\f';
      case 'v':
        return '\v';
      case 'a':
        return '\a';
      case 'x':
        return hexadecimal(2, place);
      case 'u':
        return hexadecimal(4, place);
      case 'U':
        return hexadecimal(8, place);
      case 's':
        return set.add(white_space()), kEnd;
      case 'S':
        return set.add(white_space().complement()), kEnd;
      case 'd':
        return set.add(digits()), kEnd;
      case 'D':
        return set.add(digits().complement()), kEnd;
      case 'w':
        return set.add(word_characters()), kEnd;
      case 'W':
        return set.add(word_characters().complement()), kEnd;
      case 'p':
      case 'P':
        return set.add(property(flags, escaped == 'P', place)), kEnd;
      case 'b':
      case 'B':
        fail("a word border", place);
      case 'k':
      case 'g':
        fail("a backreference", place);
      default:
        break;
    }
    if (escaped >= '1' && escaped <= '9') fail("a backreference", place);
    if (escaped < 0x80 && std::isalnum(int(escaped))) {
      fail("the unknown escape \\" + std::string(1, char(escaped)), place);
    }
    return escaped;
  }

  // \xHH, \uHHHH, \UHHHHHHHH or any of them with {..}.
  uint32_t hexadecimal(size_t num_digits, size_t place) {
    const bool braces = take('{');
    uint32_t value = 0;
    size_t taken = 0;
    for (; braces || taken < num_digits; ++taken, ++at_) {
      const uint32_t c = peek();
      if (c >= 0x80 || !std::isxdigit(int(c))) break;
      value = std::min(value * 16 + (c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10), kNumCodePoints);
    }
    if (braces ? taken == 0 || !take('}') : taken != num_digits) fail("a malformed code point", place);
    if (value >= kNumCodePoints) fail("a code point above U+10FFFF", place);
    return value;
  }

  CodePointSet property(Flags flags, bool negated, size_t place) {
    std::string name;
    if (take('{')) {
      while (peek() != '}' && peek() != kEnd) name += peek() < 0x80 ? char(text_[at_++]) : (++at_, '?');
      if (!take('}')) fail("a property without its end", place);
    } else if (peek() < 0x80) {
      name = char(text_[at_++]);
    }
    if (!name.empty() && name[0] == '^') {
      negated = !negated;
      name.erase(0, 1);
    }
    CodePointSet set;
    if (!find_property(name, flags.ignore_case, set)) fail("the unknown property '" + name + "'", place);
    return negated ? set.complement() : set;
  }

  std::vector<uint32_t> text_;
  size_t at_ = 0;
};

}  // namespace

bool RegexNode::may_be_empty() const {
  const auto empty = [](const Node& child) { return child->may_be_empty(); };
  switch (kind) {
    case kSet:
      return false;
    case kConcat:
      return std::all_of(children.begin(), children.end(), empty);
    case kAlternate:
      return std::any_of(children.begin(), children.end(), empty);
    case kRepeat:
      return min == 0 || children[0]->may_be_empty();
    default:
      return true;
  }
}

std::unique_ptr<RegexNode> parse_regex(std::string_view pattern) { return Parser(pattern).parse(); }

}  // namespace herdkern::text
