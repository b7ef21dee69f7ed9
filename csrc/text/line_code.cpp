#include "text/line_code.h"

#include <cstring>
#include <memory>
#include <string_view>
#include <vector>

#include "text/unicode_sets.h"
#include "text/utf8.h"

namespace herdkern::text {

namespace {

// One bit per code point: \w.
class WordSet {
 public:
  WordSet() : bits_(0x110000 / 64, 0) {
    uint32_t next = 0;
    for (const uint16_t run : kCategoryRuns) {
      const char major = kCategoryNames[run & 31][0];
      for (int i = 0; i < run >> 5; ++i, ++next)
        if (major == 'L' || major == 'N' || next == '_') bits_[next / 64] |= uint64_t{1} << (next % 64);
    }
  }
  bool has(uint32_t c) const { return bits_[c / 64] >> (c % 64) & 1; }

 private:
  std::vector<uint64_t> bits_;
};

const WordSet& word_set() {
  static const WordSet set;
  return set;
}

bool is_ascii_word(uint8_t c) {
  return static_cast<uint8_t>((c | 0x20) - 'a') < 26 || static_cast<uint8_t>(c - '0') < 10 || c == '_';
}

// Bytes of the \w that starts at p, 0 if none does.
int word_at(const uint8_t* p, const uint8_t* end) {
  if (p >= end) return 0;
  if (*p < 0x80) return is_ascii_word(*p);
  const DecodedCodePoint c = decode_utf8(p, end);
  return c.num_bytes > 1 && word_set().has(c.code_point) ? static_cast<int>(c.num_bytes) : 0;
}

const uint8_t* skip_words(const uint8_t* p, const uint8_t* end) {
  while (const int size = word_at(p, end)) p += size;
  return p;
}

// Whether a \w ends at p.
bool word_before(const uint8_t* begin, const uint8_t* p) {
  if (p == begin) return false;
  if (p[-1] < 0x80) return is_ascii_word(p[-1]);
  const uint8_t* start = p - 1;
  while (start > begin && p - start < 4 && (*start & 0xC0) == 0x80) --start;
  const DecodedCodePoint c = decode_utf8(start, p);
  return start + c.num_bytes == p && c.num_bytes > 1 && word_set().has(c.code_point);
}

bool starts(const uint8_t* p, const uint8_t* end, std::string_view prefix) {
  return end - p >= static_cast<std::ptrdiff_t>(prefix.size()) && std::memcmp(p, prefix.data(), prefix.size()) == 0;
}

// [\w.]+ from p on; p itself if there is none.
const uint8_t* skip_dotted(const uint8_t* p, const uint8_t* end) {
  for (;;) {
    const int size = p < end && *p == '.' ? 1 : word_at(p, end);
    if (size == 0) return p;
    p += size;
  }
}

// import a.b as c,   from a.b import   def f(   class C(   @f
bool is_definition(const uint8_t* p, const uint8_t* end) {
  if (starts(p, end, "import ")) {
    const uint8_t* name = skip_dotted(p + 7, end);
    if (name > p + 7) {
      if (starts(name, end, " as ") && word_at(name + 4, end)) name = skip_words(name + 4, end);
      return (name < end && *name == ',') || skip_white_space(name, end) == end;
    }
  } else if (starts(p, end, "from ")) {
    const uint8_t* name = skip_dotted(p + 5, end);
    return name > p + 5 && starts(name, end, " import ");
  } else if (starts(p, end, "def ")) {
    const uint8_t* name = skip_words(p + 4, end);
    return name > p + 4 && name < end && *name == '(';
  } else if (starts(p, end, "class ")) {
    const uint8_t* name = skip_words(p + 6, end);
    return name > p + 6 && name < end && (*name == '(' || *name == ':');
  }
  return p < end && *p == '@' && word_at(p + 1, end);
}

// What starts a line of code: of `p`, the first that is no white space. last: of what is no white space.
bool has_code_start(const uint8_t* p, const uint8_t* last, const uint8_t* end) {
  for (const std::string_view mark : {"#include", "#!", "//", "/*", "*/", "<?", "<!--"})
    if (starts(p, end, mark)) return true;
  for (const std::string_view prompt : {">>> ", "... ", "$ "})
    if (starts(p, end, prompt) && word_at(p + prompt.size(), end)) return true;
  for (const std::string_view word : {"return", "elif", "except", "raise", "assert", "yield", "print"}) {
    if (!starts(p, end, word) || word_at(p + word.size(), end)) continue;
    for (const uint8_t* q = p + word.size(); q < end; ++q)
      if (*q == '(' || *q == ')' || *q == ':' || *q == '=') return true;
  }
  for (const std::string_view word : {"if", "for", "while", "with", "try", "else"})
    if (starts(p, end, word) && !word_at(p + word.size(), end) && *last == ':' &&
        last >= p + static_cast<std::ptrdiff_t>(word.size()))
      return true;
  return is_definition(p, end);
}

// ]  )  }  and no more, but for one of , ; : at the end. [p, stop) is without white space around it.
bool is_closing(const uint8_t* p, const uint8_t* stop) {
  const auto closes = [](uint8_t c) { return c == ']' || c == ')' || c == '}'; };
  if (!closes(*p)) return false;
  while (p < stop && closes(*p)) ++p;
  return p == stop || (p + 1 == stop && (*p == ',' || *p == ';' || *p == ':'));
}

// Operators and the like that stand anywhere.
bool has_code_inside(const uint8_t* begin, const uint8_t* end) {
  for (const uint8_t* p = begin; p < end; ++p) {
    const uint8_t next = p + 1 < end ? p[1] : 0;
    switch (*p) {
      case '\t':
        return true;
      case '=':
        if (next == '=' || next == '>') return true;
        if (p - begin >= 2 && p[-1] == ' ' && next == ' ' && word_at(p + 2, end) && word_before(begin, p - 1))
          return true;
        break;
      case '!':
      case '+':
        if (next == '=') return true;
        break;
      case '-':
        if (next == '>' || next == '=') return true;
        break;
      case ':':
      case '&':
      case '|':
        if (next == *p) return true;
        break;
      case '(':
        if (next == ')' && word_before(begin, p)) return true;
        break;
      case '[':
        if (word_before(begin, p)) {
          const uint8_t* close = skip_words(p + 1, end);
          if (close < end && *close == ']') return true;
        }
        break;
      case '\\': {
        if (next == '(' || next == '[') return true;
        const auto letter = [&](int i) { return p + i < end && static_cast<uint8_t>((p[i] | 0x20) - 'a') < 26; };
        if (letter(1) && letter(2)) return true;
        break;
      }
      default:
        break;
    }
  }
  return false;
}

// $ ... $ with one of \ ^ _ = { } + < > between two neighbouring dollars.
bool has_dollar_formula(const uint8_t* begin, const uint8_t* end) {
  bool open = false, special = false;
  for (const uint8_t* p = begin; p < end; ++p) {
    if (*p == '$') {
      if (open && special) return true;
      open = true;
      special = false;
    } else {
      special |= *p == '\\' || *p == '^' || *p == '_' || *p == '=' || *p == '{' || *p == '}' || *p == '+' ||
                 *p == '<' || *p == '>';
    }
  }
  return false;
}

}  // namespace

int white_space_at(const uint8_t* p, const uint8_t* end) {
  if (p >= end) return 0;
  const uint8_t c = *p;
  if (c < 0x80) return c == ' ' || (c >= 9 && c <= 13) || (c >= 0x1C && c <= 0x1F);
  const DecodedCodePoint point = decode_utf8(p, end);
  const uint32_t v = point.code_point;
  const bool space = v == 0x85 || v == 0xA0 || v == 0x1680 || (v >= 0x2000 && v <= 0x200A) || v == 0x2028 ||
                     v == 0x2029 || v == 0x202F || v == 0x205F || v == 0x3000;
  return space ? static_cast<int>(point.num_bytes) : 0;
}

const uint8_t* skip_white_space(const uint8_t* p, const uint8_t* end) {
  while (const int size = white_space_at(p, end)) p += size;
  return p;
}

const uint8_t* strip_white_space(const uint8_t* begin, const uint8_t* end) {
  while (end > begin) {
    const uint8_t* start = end - 1;
    while (start > begin && end - start < 3 && (*start & 0xC0) == 0x80) --start;
    const int size = white_space_at(start, end);
    if (size == 0 || start + size != end) return end;
    end = start;
  }
  return end;
}

bool is_code_or_formula(const uint8_t* line, int64_t size) {
  const uint8_t* end = line + size;
  if (starts(line, end, "    ")) return true;
  const uint8_t* first = skip_white_space(line, end);
  if (first < end) {
    const uint8_t* stop = strip_white_space(first, end);
    const uint8_t last = stop[-1];
    if (last == ';' || last == '{' || last == '}') return true;
    if (is_closing(first, stop) || has_code_start(first, stop - 1, end)) return true;
  }
  return has_code_inside(line, end) || has_dollar_formula(line, end);
}

}  // namespace herdkern::text
