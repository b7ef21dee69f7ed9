// Reading and writing JSON as Python's json does: what the readers of JSON lines share. Whatever this accepts,
// json.loads accepts and reads the same from it; NaN, infinities, whole numbers of thousands of digits and deep nesting
// are refused, though Python reads them. The text must be UTF-8; nothing here looks at that.
#pragma once
#include <array>
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

// What a backslash and each letter stand for; 0 for 'u' and for what may not follow a backslash.
inline constexpr auto kJsonEscaped = [] {
  std::array<char, 256> table{};
  for (const char same : {'"', '\\', '/'}) table[static_cast<uint8_t>(same)] = same;
  table['b'] = '\b';
  table['f'] = '\f';
  table['n'] = '\n';
  table['r'] = '\r';
  table['t'] = '\t';
  return table;
}();

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
    if (!to_special_in_blocks(string)) return false;
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
  // Over whole blocks, to the quote or control character that ends the string or to the last block. Texts have an
  // escape every 30 bytes: a loop over them (tried) takes three times as long as this look at all of a block at once.
  bool to_special_in_blocks([[maybe_unused]] JsonString& string) {
#if defined(__SSE2__)
    while (end_ - p_ >= 64) {
      const Block block(p_);
      if ((block.slashes & block.slashes << 1) == 0) {
        const uint64_t escaped = block.slashes << 1;
        const uint64_t last = (block.quotes & ~escaped) | block.controls;
        const uint64_t inside = last ^ (last - 1);  // up to the first of them; all bits if there is none
        if ((escaped & inside & ~usual_letters(p_)) == 0) {
          string.has_escapes |= (block.slashes & inside) != 0;
          p_ += last != 0 ? __builtin_ctzll(last) : 64 - static_cast<int>(block.slashes >> 63);
          if (last != 0) return true;
          continue;
        }
      }
      if (!escapes_of_block(block, string)) return false;
      if (p_ < end_ && (*p_ == '"' || static_cast<uint8_t>(*p_) < 0x20)) return true;
    }
#endif
    return true;
  }

#if defined(__SSE2__)
  struct Block {  // a bit for each of 64 bytes
    explicit Block(const char* p) {
      const __m128i last_control = _mm_set1_epi8(0x1F);
      for (int i = 0; i < 4; ++i) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i);
        quotes |= bits(_mm_cmpeq_epi8(bytes, _mm_set1_epi8('"')), i);
        slashes |= bits(_mm_cmpeq_epi8(bytes, _mm_set1_epi8('\\')), i);
        controls |= bits(_mm_cmpeq_epi8(_mm_min_epu8(bytes, last_control), bytes), i);
      }
    }
    static uint64_t bits(__m128i found, int i) {
      return static_cast<uint64_t>(static_cast<uint32_t>(_mm_movemask_epi8(found))) << (16 * i);
    }
    uint64_t quotes = 0, slashes = 0, controls = 0;
  };

  // Those of 64 bytes that stand behind most backslashes.
  static uint64_t usual_letters(const char* p) {
    uint64_t mask = 0;
    for (int i = 0; i < 4; ++i) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i);
      const auto is = [&](char c) { return _mm_cmpeq_epi8(bytes, _mm_set1_epi8(c)); };
      mask |= Block::bits(_mm_or_si128(_mm_or_si128(is('n'), is('t')), _mm_or_si128(is('"'), is('r'))), i);
    }
    return mask;
  }

  // Escape by escape: behind the last that begins in the block, at least to its end, or to what ends the string.
  bool escapes_of_block(const Block& block, JsonString& string) {
    const char* begin = p_;
    const uint64_t special = block.quotes | block.slashes | block.controls;
    while (p_ - begin < 64) {
      const uint64_t found = special >> (p_ - begin);
      if (found == 0) {
        p_ = begin + 64;
        return true;
      }
      p_ += __builtin_ctzll(found);
      if (*p_ != '\\') return true;
      string.has_escapes = true;
      if (!escape(string.is_plain)) return false;
    }
    return true;
  }
#endif

  void skip_unescaped() {  // to the next quote, backslash or control character
    while (p_ < end_ && *p_ != '"' && *p_ != '\\' && static_cast<uint8_t>(*p_) >= 0x20) ++p_;
  }

  bool escape(bool& is_plain) {  // at a backslash
    if (end_ - p_ < 2) return false;
    const char kind = p_[1];
    if (kind != 'u') {
      if (kJsonEscaped[static_cast<uint8_t>(kind)] == 0) return false;
      is_plain &= kind != '/';
      p_ += 2;
      return true;
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

#if defined(__SSE2__)
inline uint64_t backslashes(const char* p) {  // a bit for each of 64 bytes
  uint64_t mask = 0;
  for (int i = 0; i < 4; ++i) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i);
    const int found = _mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_set1_epi8('\\')));
    mask |= static_cast<uint64_t>(static_cast<uint32_t>(found)) << (16 * i);
  }
  return mask;
}
#endif

// What one escape stands for, written to `to`; p (at the backslash) and `to` move on. Half a surrogate pair alone
// becomes U+FFFD and is_good false.
inline void unescape_one(const char*& p, const char* end, char*& to, bool& is_good) {
  const char kind = p[1];
  p += 2;
  if (kind != 'u') {
    *to++ = kJsonEscaped[static_cast<uint8_t>(kind)];
    return;
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

// What a string stands for, written to `to`, which has room for raw.size() bytes: no escape is shorter than what it
// stands for. Half a surrogate pair alone becomes U+FFFD, and is_good false. Returns the end.
inline char* unescape(std::string_view raw, char* to, bool& is_good) {
  const char* p = raw.data();
  const char* end = p + raw.size();
  is_good = true;
#if defined(__SSE2__)
  // Blocks; behind each escape the next 64 bytes are copied whatever they hold, so that nothing asks where it ends.
  constexpr ptrdiff_t kRoom = 64 + 12 + 64;  // a block, an escape that begins at its end, a copy
  while (end - p >= kRoom) {
    const char* block = p;
    std::memcpy(to, p, 64);
    for (uint64_t found = backslashes(block); found != 0;) {
      const char* place = block + __builtin_ctzll(found);
      to += place - p;
      p = place;
      unescape_one(p, end, to, is_good);
      std::memcpy(to, p, 64);
      if (p - block >= 64) break;
      found &= ~uint64_t{0} << (p - block);
    }
    if (p - block >= 64) continue;
    to += block + 64 - p;
    p = block + 64;
  }
#endif
  while (p < end) {
    if (*p == '\\') {
      unescape_one(p, end, to, is_good);
    } else {
      *to++ = *p++;
    }
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
