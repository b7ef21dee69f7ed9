// Reading and writing JSON as Python's json does: what the readers of JSON lines share. Whatever this accepts,
// json.loads accepts and reads the same from it; NaN, infinities, whole numbers of thousands of digits and deep nesting
// are refused, though Python reads them. The text must be UTF-8; nothing here looks at that.
#pragma once
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "text/any_text.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace herdkern::text {

struct JsonString {
  std::string_view raw;  // between the quotes
  bool has_escapes = false;
  bool is_plain = true;  // written as json.dumps(ensure_ascii=False) writes it
};

inline int json_hex4(const char* p) {  // -1 if these are not four digits
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

// A cursor over one line of JSON. Each method reads one thing and says whether it was there.
class JsonScanner {
 public:
  static constexpr int kMaxDigits = 4000;  // Python refuses whole numbers of more than 4300

  explicit JsonScanner(std::string_view line, int max_digits = kMaxDigits)
      : p_(line.data()), end_(p_ + line.size()), max_digits_(max_digits) {}

  bool at_end() const { return p_ == end_; }
  char next() const { return p_ == end_ ? '\0' : *p_; }
  const char* place() const { return p_; }
  void white() {
    while (p_ < end_ && (*p_ == ' ' || *p_ == '\t' || *p_ == '\n' || *p_ == '\r')) ++p_;
  }
  bool is(char c) {
    if (p_ == end_ || *p_ != c) return false;
    ++p_;
    return true;
  }
  bool is_after_white(char c) { return white(), is(c); }
  bool literal(std::string_view word) {
    if (static_cast<size_t>(end_ - p_) < word.size() || std::memcmp(p_, word.data(), word.size()) != 0) return false;
    p_ += word.size();
    return true;
  }

  bool string(JsonString& string) {
    if (!is('"')) return false;
    const char* begin = p_;
    string.has_escapes = false;
    string.is_plain = true;
    for (;;) {
      skip_unescaped();
      if (p_ == end_ || static_cast<uint8_t>(*p_) < 0x20) return false;
      if (*p_ == '"') break;
      string.has_escapes = true;
      if (!escape(string.is_plain)) return false;
    }
    string.raw = {begin, static_cast<size_t>(p_++ - begin)};
    return true;
  }

  bool number(std::string_view& raw, bool& is_whole) {
    const char* begin = p_;
    is_whole = true;
    is('-');
    const char* first = p_;
    if (!is('0') && !digits()) return false;
    const bool is_long = p_ - first > max_digits_;
    if (is('.')) {
      is_whole = false;
      if (!digits()) return false;
    }
    if (is('e') || is('E')) {
      is_whole = false;
      if (!is('+')) is('-');
      if (!digits()) return false;
    }
    raw = {begin, static_cast<size_t>(p_ - begin)};
    return !(is_whole && is_long);
  }

 private:
  // To the next quote, backslash or control character.
  void skip_unescaped() {
#if defined(__SSE2__)
    const __m128i quote = _mm_set1_epi8('"'), slash = _mm_set1_epi8('\\'), last_control = _mm_set1_epi8(0x1F);
    for (; end_ - p_ >= 16; p_ += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p_));
      const __m128i control = _mm_cmpeq_epi8(_mm_min_epu8(bytes, last_control), bytes);
      const __m128i found =
          _mm_or_si128(control, _mm_or_si128(_mm_cmpeq_epi8(bytes, quote), _mm_cmpeq_epi8(bytes, slash)));
      if (const int mask = _mm_movemask_epi8(found); mask != 0) {
        p_ += __builtin_ctz(static_cast<unsigned>(mask));
        return;
      }
    }
#endif
    while (p_ < end_ && *p_ != '"' && *p_ != '\\' && static_cast<uint8_t>(*p_) >= 0x20) ++p_;
  }

  bool escape(bool& is_plain) {  // at a backslash
    if (end_ - p_ < 2) return false;
    switch (p_[1]) {
      case '/':
        is_plain = false;
        [[fallthrough]];
      case '"':
      case '\\':
      case 'b':
      case 'f':
      case 'n':
      case 'r':
      case 't':
        p_ += 2;
        return true;
      case 'u':
        break;
      default:
        return false;
    }
    if (end_ - p_ < 6) return false;
    const int c = json_hex4(p_ + 2);
    if (c < 0) return false;
    // json.dumps writes control characters so, in small letters, except for those that have a letter of their own.
    const bool has_letter = c == '\b' || c == '\f' || c == '\n' || c == '\r' || c == '\t';
    is_plain &= c < 0x20 && !has_letter && (p_[5] <= '9' || p_[5] >= 'a');
    p_ += 6;
    return true;
  }

  bool digits() {
    const char* begin = p_;
    while (p_ < end_ && *p_ >= '0' && *p_ <= '9') ++p_;
    return p_ > begin;
  }

  const char* p_;
  const char* end_;
  int max_digits_;
};

// What a string stands for, written to `to`, which has room for raw.size() bytes: no escape is shorter than what it
// stands for. Half a surrogate pair alone becomes U+FFFD, and is_good false. Returns the end.
inline char* unescape(std::string_view raw, char* to, bool& is_good) {
  const char* p = raw.data();
  const char* end = p + raw.size();
  is_good = true;
  while (p < end) {
#if defined(__SSE2__)
    for (; end - p >= 16; p += 16, to += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
      if (const int mask = _mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_set1_epi8('\\'))); mask != 0) {
        const int plain = __builtin_ctz(static_cast<unsigned>(mask));
        p += plain;
        to += plain;
        break;
      }
    }
#endif
    while (p < end && *p != '\\') *to++ = *p++;
    if (p == end) break;
    const char kind = p[1];
    p += 2;
    if (kind != 'u') {
      *to++ = kind == 'b'   ? '\b'
              : kind == 'f' ? '\f'
              : kind == 'n' ? '\n'
              : kind == 'r' ? '\r'
              : kind == 't' ? '\t'
                            : kind;
      continue;
    }
    auto c = static_cast<uint32_t>(json_hex4(p));
    p += 4;
    if (c - 0xD800u < 0x800u) {
      const bool has_low = c < 0xDC00 && end - p >= 6 && p[0] == '\\' && p[1] == 'u';
      const uint32_t low = has_low ? static_cast<uint32_t>(json_hex4(p + 2)) : 0;
      if (low - 0xDC00u < 0x400u) {
        c = 0x10000 + ((c - 0xD800) << 10 | (low - 0xDC00));
        p += 6;
      } else {
        c = 0xFFFD;
        is_good = false;
      }
    }
    unsigned num_bytes;
    store_little_endian(utf8_word<4>(c, num_bytes), reinterpret_cast<uint8_t*>(to));
    to += num_bytes;
  }
  return to;
}

// A text as json.dumps(ensure_ascii=False) writes it between quotes, appended.
inline void append_escaped(std::string_view text, std::string& out) {
  size_t begin = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto c = static_cast<uint8_t>(text[i]);
    if (c >= 0x20 && c != '"' && c != '\\') continue;
    out.append(text, begin, i - begin);
    begin = i + 1;
    out += '\\';
    switch (c) {
      case '\b':
        out += 'b';
        break;
      case '\f':
        out += 'f';
        break;
      case '\n':
        out += 'n';
        break;
      case '\r':
        out += 'r';
        break;
      case '\t':
        out += 't';
        break;
      case '"':
      case '\\':
        out += static_cast<char>(c);
        break;
      default:
        out += "u00";
        out += static_cast<char>('0' + (c >> 4));
        out += "0123456789abcdef"[c & 15];
    }
  }
  out.append(text, begin, text.size() - begin);
}

// As Python's repr: the fewest digits that give the number back, with an exponent from 1e16 and below 1e-4.
inline void append_float(double value, std::string& out) {
  char text[40];  // a digit, a point, sixteen more, an exponent
  const char* end = std::to_chars(text, text + sizeof(text), value, std::chars_format::scientific).ptr;
  const char* p = text;
  if (*p == '-') out += *p++;
  const char* mark = p;
  while (*mark != 'e') ++mark;
  int exponent = 0;
  std::from_chars(mark + (mark[1] == '+' ? 2 : 1), end, exponent);
  std::string digits(p, 1);
  if (mark - p > 2) digits.append(p + 2, mark);
  const int count = static_cast<int>(digits.size());
  if (exponent < -4 || exponent >= 16) {
    out.append(p, mark);
    out += exponent < 0 ? "e-" : "e+";
    const int size = exponent < 0 ? -exponent : exponent;
    if (size < 10) out += '0';
    out += std::to_string(size);
  } else if (exponent < 0) {
    out += "0.";
    out.append(static_cast<size_t>(-exponent - 1), '0');
    out += digits;
  } else if (exponent + 1 >= count) {
    out += digits;
    out.append(static_cast<size_t>(exponent + 1 - count), '0');
    out += ".0";
  } else {
    out.append(digits, 0, static_cast<size_t>(exponent + 1));
    out += '.';
    out.append(digits, static_cast<size_t>(exponent + 1));
  }
}

// A number as Python writes again what it reads, appended. False for one that a float cannot hold.
inline bool append_number(std::string_view raw, bool is_whole, std::string& out) {
  if (is_whole) {
    out += raw == "-0" ? std::string_view("0") : raw;
    return true;
  }
  double value = 0;
  const auto read = std::from_chars(raw.data(), raw.data() + raw.size(), value);
  if (read.ec != std::errc() || read.ptr != raw.data() + raw.size()) return false;
  append_float(value, out);
  return true;
}

// Any value of at most so many containers inside each other, appended to `out` as json.dumps writes it again; without
// `out` it is only passed over. False also if an object that is to be written has a key twice: of several, Python keeps
// the last value at the first place.
bool pass_json_value(JsonScanner& scan, int depth, std::string* out);

}  // namespace herdkern::text
