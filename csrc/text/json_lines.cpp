// JSON lines: see json_lines.h.
#include "text/json_lines.h"

#include <cstring>

#include "text/any_text.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace herdkern::text {

namespace {

constexpr int kMaxDepth = 64;
constexpr int kMaxDigits = 4000;  // Python refuses integers of more than 4300

const char* skip_ascii(const char* p, const char* end) {
#if defined(__SSE2__)
  for (; end - p >= 16; p += 16) {
    const int high = _mm_movemask_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    if (high != 0) return p + __builtin_ctz(unsigned(high));
  }
#endif
  while (p < end && uint8_t(*p) < 0x80) ++p;
  return p;
}

// Well-formed by table 3-7 of the Unicode standard.
bool is_utf8(std::string_view text) {
  const char* p = text.data();
  const char* end = p + text.size();
  const auto tail = [](char c) { return (uint8_t(c) & 0xC0) == 0x80; };
  while ((p = skip_ascii(p, end)) < end) {
    for (; p < end && uint8_t(*p) >= 0x80;) {
      const uint8_t lead = uint8_t(*p);
      const auto left = end - p;
      if (lead >= 0xC2 && lead < 0xE0) {
        if (left < 2 || !tail(p[1])) return false;
        p += 2;
      } else if (lead >= 0xE0 && lead < 0xF0) {
        if (left < 3 || !tail(p[1]) || !tail(p[2])) return false;
        const uint8_t second = uint8_t(p[1]);
        if ((lead == 0xE0 && second < 0xA0) || (lead == 0xED && second >= 0xA0)) return false;
        p += 3;
      } else if (lead >= 0xF0 && lead < 0xF5) {
        if (left < 4 || !tail(p[1]) || !tail(p[2]) || !tail(p[3])) return false;
        const uint8_t second = uint8_t(p[1]);
        if ((lead == 0xF0 && second < 0x90) || (lead == 0xF4 && second >= 0x90)) return false;
        p += 4;
      } else {
        return false;
      }
    }
  }
  return true;
}

// To the next quote, backslash or control character.
const char* skip_plain(const char* p, const char* end) {
#if defined(__SSE2__)
  const __m128i quote = _mm_set1_epi8('"'), slash = _mm_set1_epi8('\\'), last_control = _mm_set1_epi8(0x1F);
  for (; end - p >= 16; p += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i control = _mm_cmpeq_epi8(_mm_min_epu8(bytes, last_control), bytes);
    const __m128i found =
        _mm_or_si128(control, _mm_or_si128(_mm_cmpeq_epi8(bytes, quote), _mm_cmpeq_epi8(bytes, slash)));
    const int mask = _mm_movemask_epi8(found);
    if (mask != 0) return p + __builtin_ctz(unsigned(mask));
  }
#endif
  while (p < end && *p != '"' && *p != '\\' && uint8_t(*p) >= 0x20) ++p;
  return p;
}

int hex4(const char* p) {
  int value = 0;
  for (int i = 0; i < 4; ++i) {
    const char c = p[i];
    const int digit = c >= '0' && c <= '9'                     ? c - '0'
                      : (c | 0x20) >= 'a' && (c | 0x20) <= 'f' ? (c | 0x20) - 'a' + 10
                                                               : -1;
    if (digit < 0) return -1;
    value = value << 4 | digit;
  }
  return value;
}

struct JsonString {
  std::string_view raw;
  bool has_escapes = false;
};

// What a checked string stands for, written to out; false for a lone surrogate.
bool unescape(std::string_view raw, char*& out) {
  const char* p = raw.data();
  const char* end = p + raw.size();
  while (p < end) {
    const auto* slash = static_cast<const char*>(std::memchr(p, '\\', size_t(end - p)));
    const size_t plain = size_t((slash == nullptr ? end : slash) - p);
    std::memcpy(out, p, plain);
    out += plain;
    if (slash == nullptr) break;
    p = slash + 2;
    switch (slash[1]) {
      case 'b':
        *out++ = '\b';
        break;
      case 'f':
        *out++ = '\f';
        break;
      case 'n':
        *out++ = '\n';
        break;
      case 'r':
        *out++ = '\r';
        break;
      case 't':
        *out++ = '\t';
        break;
      case 'u': {
        auto c = uint32_t(hex4(p));
        p += 4;
        if (c - 0xD800u < 0x800u) {
          if (c >= 0xDC00 || end - p < 6 || p[0] != '\\' || p[1] != 'u') return false;
          const auto low = uint32_t(hex4(p + 2));
          if (low - 0xDC00u >= 0x400u) return false;
          c = 0x10000 + ((c - 0xD800) << 10 | (low - 0xDC00));
          p += 6;
        }
        unsigned num_bytes;  // four are written, the escape had six
        store_little_endian(utf8_word<4>(c, num_bytes), reinterpret_cast<uint8_t*>(out));
        out += num_bytes;
        break;
      }
      default:
        *out++ = slash[1];
    }
  }
  return true;
}

// Each method reads one thing at p_ and says whether it was there.
class Parser {
 public:
  explicit Parser(std::string_view line) : p_(line.data()), end_(p_ + line.size()) {}

  // An object with a string under the key, the last one if there are several, and nothing behind it.
  bool object_with(std::string_view key, JsonString& text) {
    bool found = false;
    white();
    if (!is('{')) return false;
    white();
    if (is('}')) return false;
    do {
      JsonString name;
      white();
      if (!string(name) || name.has_escapes) return false;
      white();
      if (!is(':')) return false;
      white();
      if (name.raw == key) {
        if (!string(text)) return false;
        found = true;
      } else if (!value(0)) {
        return false;
      }
      white();
    } while (is(','));
    if (!is('}')) return false;
    white();
    return found && p_ == end_;
  }

 private:
  void white() {
    while (p_ < end_ && (*p_ == ' ' || *p_ == '\t' || *p_ == '\n' || *p_ == '\r')) ++p_;
  }
  bool is(char c) {
    if (p_ == end_ || *p_ != c) return false;
    ++p_;
    return true;
  }
  bool literal(std::string_view word) {
    if (size_t(end_ - p_) < word.size() || std::memcmp(p_, word.data(), word.size()) != 0) return false;
    p_ += word.size();
    return true;
  }
  bool string(JsonString& string) {
    if (!is('"')) return false;
    const char* begin = p_;
    string.has_escapes = false;
    for (;;) {
      p_ = skip_plain(p_, end_);
      if (p_ == end_ || uint8_t(*p_) < 0x20) return false;
      if (*p_ == '"') break;
      string.has_escapes = true;
      if (end_ - p_ < 2) return false;
      const char c = p_[1];
      if (c == 'u') {
        if (end_ - p_ < 6 || hex4(p_ + 2) < 0) return false;
        p_ += 6;
      } else if (c != '\0' && std::strchr("\"\\/bfnrt", c) != nullptr) {
        p_ += 2;
      } else {
        return false;
      }
    }
    string.raw = {begin, size_t(p_ - begin)};
    ++p_;
    return true;
  }
  int digits() {
    const char* begin = p_;
    while (p_ < end_ && *p_ >= '0' && *p_ <= '9') ++p_;
    return int(p_ - begin < kMaxDigits ? p_ - begin : kMaxDigits);
  }
  bool number() {
    is('-');
    if (!is('0')) {
      const int num_digits = digits();
      if (num_digits == 0 || num_digits == kMaxDigits) return false;
    }
    if (is('.') && digits() == 0) return false;
    if (is('e') || is('E')) {
      if (!is('+')) is('-');
      if (digits() == 0) return false;
    }
    return true;
  }
  bool value(int depth) {
    if (p_ == end_ || depth > kMaxDepth) return false;
    JsonString ignored;
    switch (*p_) {
      case '"':
        return string(ignored);
      case 't':
        return literal("true");
      case 'f':
        return literal("false");
      case 'n':
        return literal("null");
      case '{':
      case '[':
        return container(depth, *p_ == '{');
      default:
        return number();
    }
  }
  bool container(int depth, bool is_object) {
    const char close = is_object ? '}' : ']';
    ++p_;
    white();
    if (is(close)) return true;
    do {
      white();
      if (is_object) {
        JsonString name;
        if (!string(name)) return false;
        white();
        if (!is(':')) return false;
        white();
      }
      if (!value(depth + 1)) return false;
      white();
    } while (is(','));
    return is(close);
  }

  const char* p_;
  const char* end_;
};

}  // namespace

JsonLine text_of_json_line(std::string_view line, std::string_view key, char*& scratch, std::string_view& text) {
  if (line.find_first_not_of(" \t\n\r\v\f") == std::string_view::npos) return JsonLine::kBlank;
  JsonString found;
  if (!is_utf8(line) || !Parser(line).object_with(key, found)) return JsonLine::kOther;
  text = found.raw;
  if (!found.has_escapes) return JsonLine::kText;
  char* begin = scratch;
  if (!unescape(found.raw, scratch)) {
    scratch = begin;
    return JsonLine::kOther;
  }
  text = {begin, size_t(scratch - begin)};
  return JsonLine::kText;
}

}  // namespace herdkern::text
