// Documents as lines of JSON: see document_lines.h.
#include "text/document_lines.h"

#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "text/minhash.h"

namespace herdkern::text {

namespace {

constexpr int kMaxDepth = 16;
constexpr int64_t kMaxTimestamp = int64_t{1} << 53;

// To the next quote, backslash, control character or byte that is not ASCII.
const char* skip_ascii_plain(const char* p, const char* end) {
#if defined(__SSE2__)
  const __m128i quote = _mm_set1_epi8('"'), slash = _mm_set1_epi8('\\'), space = _mm_set1_epi8(0x20);
  for (; end - p >= 16; p += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i odd = _mm_or_si128(_mm_cmplt_epi8(bytes, space),  // signed: bytes above 0x7F are below it too
                                     _mm_or_si128(_mm_cmpeq_epi8(bytes, quote), _mm_cmpeq_epi8(bytes, slash)));
    const int mask = _mm_movemask_epi8(odd);
    if (mask != 0) return p + __builtin_ctz(unsigned(mask));
  }
#endif
  while (p < end && uint8_t(*p) >= 0x20 && uint8_t(*p) < 0x80 && *p != '"' && *p != '\\') ++p;
  return p;
}

// Behind the well-formed sequence at p (table 3-7 of the Unicode standard), null if there is none.
const char* skip_sequence(const char* p, const char* end) {
  const auto tail = [&](int i) { return (uint8_t(p[i]) & 0xC0) == 0x80; };
  const uint8_t lead = uint8_t(*p);
  const auto left = end - p;
  if (lead >= 0xC2 && lead < 0xE0) return left >= 2 && tail(1) ? p + 2 : nullptr;
  if (left < 3) return nullptr;
  const uint8_t second = uint8_t(p[1]);
  if (lead >= 0xE0 && lead < 0xF0) {
    const bool bad = (lead == 0xE0 && second < 0xA0) || (lead == 0xED && second >= 0xA0);
    return !bad && tail(1) && tail(2) ? p + 3 : nullptr;
  }
  if (lead < 0xF0 || lead >= 0xF5 || left < 4) return nullptr;
  const bool bad = (lead == 0xF0 && second < 0x90) || (lead == 0xF4 && second >= 0x90);
  return !bad && tail(1) && tail(2) && tail(3) ? p + 4 : nullptr;
}

// Each method reads one thing at p_ and says whether it was there, written as Python's json.dumps would.
class PlainParser {
 public:
  explicit PlainParser(std::string_view line) : p_(line.data()), end_(p_ + line.size()) {}

  bool document(std::string_view score_key, PlainLine& out) {
    std::string_view source, record;
    out.score = -std::numeric_limits<double>::infinity();
    return literal("{\"id\":") && string(out.id) && !out.id.empty() && literal(",\"text\":") && string(out.text) &&
           literal(",\"url\":") && string(out.url) && literal(",\"source\":") && string(source) &&
           literal(",\"lang\":") && string(out.lang) && literal(",\"timestamp\":") && integer(out.timestamp) &&
           std::abs(out.timestamp) <= kMaxTimestamp && literal(",\"record\":") && string(record) && !record.empty() &&
           literal(",\"meta\":{") && meta(score_key, out.score) && literal("}") && p_ == end_;
  }

 private:
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

  bool escape() {  // behind the backslash: what json.dumps writes with ensure_ascii=False, nothing else
    if (p_ == end_) return false;
    const char c = *p_++;
    if (c != 'u') return c == '"' || c == '\\' || c == 'n' || c == 'r' || c == 't' || c == 'b' || c == 'f';
    if (end_ - p_ < 4 || p_[0] != '0' || p_[1] != '0' || (p_[2] != '0' && p_[2] != '1')) return false;
    const char last = p_[3];
    const bool is_digit = last >= '0' && last <= '9';
    if (!is_digit && !(last >= 'a' && last <= 'f')) return false;
    if (p_[2] == '0' && (last == '8' || last == '9' || last == 'a' || last == 'c' || last == 'd')) return false;
    p_ += 4;
    return true;
  }

  bool string(std::string_view& raw) {
    if (!is('"')) return false;
    const char* begin = p_;
    for (;;) {
      p_ = skip_ascii_plain(p_, end_);
      if (p_ == end_) return false;
      if (*p_ == '"') {
        raw = {begin, size_t(p_++ - begin)};
        return true;
      }
      if (*p_ == '\\') {
        ++p_;
        if (!escape()) return false;
        continue;
      }
      if (uint8_t(*p_) < 0x80) return false;
      while (p_ < end_ && uint8_t(*p_) >= 0x80) {
        p_ = skip_sequence(p_, end_);
        if (p_ == nullptr) return p_ = end_, false;
      }
    }
  }

  bool integer(int64_t& value) {
    const char* begin = p_;
    const char* digits = is('-') ? p_ : begin;
    while (p_ < end_ && *p_ >= '0' && *p_ <= '9') ++p_;
    const auto count = p_ - digits;
    if (count < 1 || count > 18 || (*digits == '0' && (count > 1 || digits != begin))) return false;
    return std::from_chars(begin, p_, value).ec == std::errc();
  }

  bool number(double& value) {
    const char* begin = p_;
    int64_t whole = 0;
    if (integer(whole) && (p_ == end_ || (*p_ != '.' && *p_ != 'e' && *p_ != 'E'))) {
      value = static_cast<double>(whole);
      return true;
    }
    p_ = begin;
    while (p_ < end_ && (*p_ == '-' || *p_ == '.' || (*p_ >= '0' && *p_ <= '9'))) ++p_;
    if (std::from_chars(begin, p_, value).ptr != p_) return false;
    const double size = std::fabs(value);
    if (!(size == 0 ? !std::signbit(value) : size >= 1e-4 && size < 1e15)) return false;  // others have an exponent
    char written[64];
    const auto end = std::to_chars(written, written + sizeof(written) - 2, value, std::chars_format::fixed);
    std::string shortest(written, end.ptr);
    if (shortest.find('.') == std::string::npos) shortest += ".0";
    return shortest == std::string_view(begin, size_t(p_ - begin));
  }

  bool value(int depth, double& number_found) {
    if (p_ == end_ || depth > kMaxDepth) return false;
    std::string_view text;
    double inner = 0;
    switch (*p_) {
      case '"':
        return string(text);
      case 't':
        return literal("true");
      case 'f':
        return literal("false");
      case 'n':
        return literal("null");
      case '[':
        ++p_;
        if (is(']')) return true;
        do {
          if (!value(depth + 1, inner)) return false;
        } while (is(','));
        return is(']');
      case '{':  // one key at most: several would have to be compared for repeats
        ++p_;
        if (is('}')) return true;
        return string(text) && is(':') && value(depth + 1, inner) && is('}');
      default:
        return number(number_found);
    }
  }

  bool meta(std::string_view score_key, double& score) {
    if (is('}')) return true;
    std::string_view last;
    bool is_first = true;
    do {
      std::string_view key;
      if (!string(key) || !is(':')) return false;
      // Raw order is that of the keys only where nothing is escaped.
      if (key.find('\\') != std::string_view::npos || (!is_first && !(last < key))) return false;
      double found = std::numeric_limits<double>::quiet_NaN();
      if (!value(0, found)) return false;
      if (key == score_key && !std::isnan(found)) score = found;
      last = key;
      is_first = false;
    } while (is(','));
    return is('}');
  }

  const char* p_;
  const char* end_;
};

uint64_t load(const char* p, size_t size) {
  uint64_t value = 0;
  std::memcpy(&value, p, size);
  return value;
}

uint64_t hash_name(std::string_view text) { return hash_text(text).high | 1; }  // never 0

}  // namespace

bool read_plain_line(std::string_view line, std::string_view score_key, PlainLine& out) {
  return PlainParser(line).document(score_key, out);
}

void append_unescaped(std::string_view raw, std::string& out) {
  const char* p = raw.data();
  const char* end = p + raw.size();
  while (p < end) {
    const auto* slash = static_cast<const char*>(std::memchr(p, '\\', size_t(end - p)));
    out.append(p, size_t((slash == nullptr ? end : slash) - p));
    if (slash == nullptr) return;
    p = slash + 2;
    switch (slash[1]) {
      case 'b':
        out += '\b';
        break;
      case 'f':
        out += '\f';
        break;
      case 'n':
        out += '\n';
        break;
      case 'r':
        out += '\r';
        break;
      case 't':
        out += '\t';
        break;
      case 'u':
        out += static_cast<char>((p[2] - '0') * 16 + (p[3] <= '9' ? p[3] - '0' : p[3] - 'a' + 10));
        p += 4;
        break;
      default:
        out += slash[1];
    }
  }
}

// Two chains of folded products over 16 bytes at a time, each with constants of its own.
Hash128 hash_text(std::string_view text) {
  const char* p = text.data();
  size_t left = text.size();
  uint64_t a = mix(kGolden ^ left), b = mix(a + 0x8EBC6AF09C88C6E3u);
  for (; left > 16; p += 16, left -= 16) {
    const uint64_t x = load(p, 8), y = load(p + 8, 8);
    a = multiply_fold(x ^ a, y ^ 0xE7037ED1A0B428DBu) + y;
    b = multiply_fold(y ^ b, x ^ 0xA0761D6478BD642Fu) + x;
  }
  const uint64_t x = load(p, left < 8 ? left : 8), y = left > 8 ? load(p + 8, left - 8) : 0;
  a = multiply_fold(x ^ a, y ^ 0xE7037ED1A0B428DBu) + y;
  b = multiply_fold(y ^ b, x ^ 0xA0761D6478BD642Fu) + x;
  return {mix(multiply_fold(a ^ 0x589965CC75374CC3u, b ^ kGolden) + a),
          mix(multiply_fold(b, a ^ 0x1D8E4E27C47D124Fu) ^ b)};
}

DocumentRow make_row(std::string_view line, const PlainLine& fields, bool use_groups, std::string& names,
                     std::string& texts) {
  DocumentRow row{};
  const size_t id_begin = names.size();
  append_unescaped(fields.id, names);
  const size_t url_begin = names.size();
  append_unescaped(fields.url, names);
  const std::string_view id(names.data() + id_begin, url_begin - id_begin);
  char first[16] = {};
  std::memcpy(first, id.data(), std::min<size_t>(16, id.size()));
  row.id_high = __builtin_bswap64(load(first, 8));
  row.id_low = __builtin_bswap64(load(first + 8, 8));
  row.id_hash = hash_text(id).high;
  row.line_hash = hash_text(line).high;
  const size_t text_begin = texts.size();
  append_unescaped(fields.text, texts);
  const std::string_view text(texts.data() + text_begin, texts.size() - text_begin);
  const Hash128 hash = hash_text(text);
  row.text_high = hash.high;
  row.text_low = hash.low;
  row.timestamp = fields.timestamp;
  int64_t continued = 0;  // bytes behind the first of a character
  for (const char c : text) continued += (uint8_t(c) & 0xC0) == 0x80;
  row.length = static_cast<int64_t>(text.size()) - continued;
  row.score = fields.score;
  row.group = use_groups ? hash_name(fields.lang) : 0;
  row.text_bytes = text.size();
  row.id_bytes = static_cast<uint32_t>(id.size());
  row.url_bytes = static_cast<uint32_t>(names.size() - url_begin);
  row.is_plain = 1;
  return row;
}

}  // namespace herdkern::text
