#include "text/url_keys.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "text/word_key.h"
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace herdkern::text {

namespace {

enum UrlByte : uint8_t {
  kAsk,     // needs other rules
  kCopy,    // stands for itself
  kQuoted,  // is encoded
  kSlash,
  kEscape,
  kPlus,
  kEqual,
  kAnd,
  kStop,  // ends this part of the URL
};

constexpr bool is_unreserved(int c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_' ||
         c == '~' || c == '.';
}

// Of every byte, as it stands in a path or, behind %, for what it was encoded. Asked about: ; (parameters), what
// versions of w3lib treat differently ([ ] |), and what the URL standard rewrites (\).
constexpr std::array<uint8_t, 256> make_path_bytes() {
  std::array<uint8_t, 256> kinds{};
  for (int c = 0; c < 256; ++c) kinds[c] = is_unreserved(c) ? kCopy : c >= 128 ? kQuoted : kAsk;
  for (const char c : {'!', '$', '&', '\'', '(', ')', '*', '+', ',', '=', ':', '@'}) kinds[static_cast<int>(c)] = kCopy;
  for (const char c : {'"', '<', '>', '^', '`', '{', '}'}) kinds[static_cast<int>(c)] = kQuoted;
  kinds['/'] = kSlash;
  kinds['%'] = kEscape;
  kinds['?'] = kinds['#'] = kStop;
  return kinds;
}
constexpr std::array<uint8_t, 256> kPathBytes = make_path_bytes();

// As they stand in a query: all but white space and controls have a meaning there.
constexpr std::array<uint8_t, 256> make_query_bytes() {
  std::array<uint8_t, 256> kinds{};
  for (int c = 0; c < 256; ++c) kinds[c] = c > 0x20 && c != 0x7F ? kCopy : kAsk;
  kinds['%'] = kEscape;
  kinds['+'] = kPlus;
  kinds['='] = kEqual;
  kinds['&'] = kAnd;
  kinds['#'] = kStop;
  return kinds;
}
constexpr std::array<uint8_t, 256> kQueryBytes = make_query_bytes();

// As they are written in a query.
constexpr std::array<uint8_t, 256> make_written_bytes() {
  std::array<uint8_t, 256> kinds{};
  for (int c = 0; c < 256; ++c) kinds[c] = is_unreserved(c) ? kCopy : kQuoted;
  kinds[' '] = kPlus;
  return kinds;
}
constexpr std::array<uint8_t, 256> kWrittenBytes = make_written_bytes();

constexpr std::array<int8_t, 256> make_hex() {
  std::array<int8_t, 256> values{};
  for (int c = 0; c < 256; ++c)
    values[c] = static_cast<int8_t>(c >= '0' && c <= '9'   ? c - '0'
                                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                           : -1);
  return values;
}
constexpr std::array<int8_t, 256> kHex = make_hex();

uint8_t byte_at(std::string_view text, size_t i) { return static_cast<uint8_t>(text[i]); }

// The byte that %XX at place i stands for, or -1.
int escaped(std::string_view text, size_t i) {
  if (i + 2 >= text.size()) return -1;
  const int high = kHex[byte_at(text, i + 1)], low = kHex[byte_at(text, i + 2)];
  return high < 0 || low < 0 ? -1 : high << 4 | low;
}

void add_escape(char*& out, uint8_t c) {
  *out++ = '%';
  *out++ = "0123456789ABCDEF"[c >> 4];
  *out++ = "0123456789ABCDEF"[c & 15];
}

void add_text(char*& out, std::string_view text) {
  std::memcpy(out, text.data(), text.size());
  out += text.size();
}

constexpr size_t kStep = 16;  // bytes that are looked at at once; so many may be read behind a URL and written ahead

enum class Part { kHost, kPath, kQuery };

// Copies the bytes from `in` on that stand for themselves in this part, up to the first that may not; those of a host
// become small letters. Returns how many there are. Stops at a zero.
template <Part kPart>
inline size_t copy_run(const char* in, char* out) {
  size_t done = 0;
#ifdef __SSE2__
  const auto all = [](char c) { return _mm_set1_epi8(c); };
  const auto is = [&](__m128i bytes, char c) { return _mm_cmpeq_epi8(bytes, all(c)); };
  const auto within = [&](__m128i bytes, char first, char last) {
    const __m128i above = _mm_sub_epi8(bytes, all(first));
    return _mm_cmpeq_epi8(_mm_min_epu8(above, all(static_cast<char>(last - first))), above);
  };
  for (;; done += kStep) {
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + done));
    const __m128i small = _mm_or_si128(bytes, all(0x20));
    const __m128i letters = within(small, 'a', 'z'), slashes = is(bytes, '/');
    __m128i plain = _mm_or_si128(within(bytes, '-', '9'), is(bytes, '_'));  // - . / and digits
    if (kPart == Part::kPath) {  // a segment that begins with a dot is looked at on its own
      const __m128i next = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + done + 1));
      plain = _mm_andnot_si128(_mm_and_si128(slashes, is(next, '.')), plain);
    } else {
      plain = _mm_andnot_si128(slashes, plain);
    }
    plain = _mm_or_si128(plain, letters);
    if (kPart == Part::kHost) {
      bytes = _mm_or_si128(bytes, _mm_and_si128(letters, all(0x20)));
    } else {
      plain = _mm_or_si128(plain, is(bytes, '~'));
    }
    if (out) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + done), bytes);
    const auto other = static_cast<uint32_t>(~_mm_movemask_epi8(plain)) & 0xFFFFu;
    if (other) return done + static_cast<size_t>(__builtin_ctz(other));
  }
#else
  for (;; ++done) {
    const auto c = static_cast<uint8_t>(in[done]);
    const bool is_slash = kPart == Part::kPath && c == '/' && in[done + 1] != '.';
    if (!is_slash && (!is_unreserved(c) || (kPart == Part::kHost && c == '~'))) return done;
    const bool is_capital = kPart == Part::kHost && c >= 'A' && c <= 'Z';
    if (out) out[done] = static_cast<char>(is_capital ? c | 0x20 : c);
  }
#endif
}

// Scheme and host with its port, up to the path; place of the path, or 0.
size_t add_host(std::string_view url, const UrlRules& rules, char*& out) {
  const auto lower = [&](size_t i) { return static_cast<uint8_t>(byte_at(url, i) | 0x20); };
  if (url.size() < 8 || lower(0) != 'h' || lower(1) != 't' || lower(2) != 't' || lower(3) != 'p') return 0;
  const bool secure = lower(4) == 's';
  size_t at = secure ? 5 : 4;
  if (url.substr(at, 3) != "://") return 0;
  at += 3;
  add_text(out, secure && !rules.merge_schemes ? "https://" : "http://");
  char* const host = out;
  const size_t host_bytes = copy_run<Part::kHost>(url.data() + at, out);
  at += host_bytes;
  out += host_bytes;
  while (out > host && out[-1] == '.') --out;
  if (out == host) return 0;
  if (at < url.size() && url[at] == ':') {
    const size_t first = ++at;
    int port = 0;
    for (; at < url.size() && static_cast<uint8_t>(url[at] - '0') < 10 && at - first < 5; ++at)
      port = 10 * port + (url[at] - '0');
    if (at == first || url[first] == '0' || port > 65535) return 0;
    if (port != (secure ? 443 : 80)) add_text(out, url.substr(first - 1, at - first + 1));
  }
  return at == url.size() || url[at] == '/' || url[at] == '?' || url[at] == '#' ? at : 0;
}

// The path from `at` on; place of what comes behind it, or 0.
size_t add_path(std::string_view url, size_t at, const UrlRules& rules, char*& out) {
  char* const begin = out;
  for (; at < url.size(); ++at) {
    const size_t run = copy_run<Part::kPath>(url.data() + at, out);
    at += run;
    out += run;
    if (at == url.size()) break;
    const uint8_t c = byte_at(url, at);
    const uint8_t kind = kPathBytes[c];
    if (kind == kCopy) {
      *out++ = static_cast<char>(c);
    } else if (kind == kSlash) {
      if (at + 1 < url.size() && url[at + 1] == '.') return 0;
      *out++ = '/';
    } else if (kind == kEscape) {
      const int value = escaped(url, at);
      if (value < 0 || value == '.') return 0;
      const uint8_t inner = kPathBytes[value];
      if (inner == kCopy) {
        *out++ = static_cast<char>(value);
      } else if (inner == kQuoted || value == ' ') {
        add_escape(out, static_cast<uint8_t>(value));
      } else {
        return 0;
      }
      at += 2;
    } else if (kind == kQuoted) {
      add_escape(out, c);
    } else if (kind == kStop) {
      break;
    } else {
      return 0;
    }
  }
  if (rules.merge_trailing_slash)
    while (out > begin && out[-1] == '/') --out;
  if (out == begin) *out++ = '/';
  return at;
}

// Appends url[at...) decoded up to & # or, in a name, =. Place of the stop, or npos.
size_t decode_part(std::string_view url, size_t at, bool is_name, char*& out) {
  for (; at < url.size(); ++at) {
    const uint8_t c = byte_at(url, at);
    const uint8_t kind = kQueryBytes[c];
    if (kind == kCopy) {
      *out++ = static_cast<char>(c);
    } else if (kind == kAnd || kind == kStop || (kind == kEqual && is_name)) {
      break;
    } else if (kind == kEqual) {
      *out++ = '=';
    } else if (kind == kPlus) {
      *out++ = ' ';
    } else if (kind == kEscape) {
      const int value = escaped(url, at);
      if (value < 0) return std::string_view::npos;
      *out++ = static_cast<char>(value);
      at += 2;
    } else {
      return std::string_view::npos;
    }
  }
  return at;
}

void add_quoted(std::string_view text, char*& out) {
  for (const char c : text) {
    const uint8_t kind = kWrittenBytes[static_cast<uint8_t>(c)];
    if (kind == kCopy) {
      *out++ = c;
    } else if (kind == kPlus) {
      *out++ = '+';
    } else {
      add_escape(out, static_cast<uint8_t>(c));
    }
  }
}

// The field of the query at `at`, which goes behind it. False if other rules are needed.
bool read_field(std::string_view url, size_t& at, char*& decoded, UrlScratch::Field& field) {
  const auto is_end = [&](size_t i) { return i == url.size() || url[i] == '&' || url[i] == '#'; };
  const char* const begin = url.data() + at;
  const size_t name_bytes = copy_run<Part::kQuery>(begin, nullptr);
  const bool has_value = at + name_bytes < url.size() && begin[name_bytes] == '=';
  const size_t value = name_bytes + has_value;
  const size_t value_bytes = has_value ? copy_run<Part::kQuery>(begin + value, nullptr) : 0;
  if (is_end(at + value + value_bytes)) {
    field = {{begin, name_bytes}, {begin + value, value_bytes}, true};
    at += value + value_bytes;
    return true;
  }
  char* next = decoded;
  at = decode_part(url, at, true, next);
  if (at == std::string_view::npos) return false;
  field = {{decoded, static_cast<size_t>(next - decoded)}, {}, false};
  decoded = next;
  if (at < url.size() && url[at] == '=') {
    at = decode_part(url, at + 1, false, next);
    if (at == std::string_view::npos) return false;
  }
  field.value = {decoded, static_cast<size_t>(next - decoded)};
  decoded = next;
  return true;
}

// The query from `at` on, sorted, without parameters that do not count. False if other rules are needed.
bool add_query(std::string_view url, size_t at, const UrlRules& rules, UrlScratch& scratch, char*& out) {
  char* decoded = scratch.decoded.data();
  scratch.fields.clear();
  while (at < url.size() && url[at] != '#') {
    UrlScratch::Field field;
    const size_t begin = at;
    if (!read_field(url, at, decoded, field)) return false;
    const bool is_empty = at == begin;
    if (at < url.size() && url[at] == '&') ++at;
    if (is_empty) continue;
    const UrlRules::Verdict verdict = rules.judge(field.name);
    if (verdict == UrlRules::kUnclear) return false;
    if (verdict == UrlRules::kCounts) scratch.fields.push_back(field);
  }
  if (scratch.fields.size() > 1)
    std::sort(scratch.fields.begin(), scratch.fields.end(), [](const auto& a, const auto& b) {
      const int order = a.name.compare(b.name);
      return order ? order < 0 : a.value < b.value;
    });
  char mark = '?';
  for (const UrlScratch::Field& field : scratch.fields) {
    *out++ = mark;
    mark = '&';
    if (field.is_plain) {
      add_text(out, field.name);
      *out++ = '=';
      add_text(out, field.value);
    } else {
      add_quoted(field.name, out);
      *out++ = '=';
      add_quoted(field.value, out);
    }
  }
  return true;
}

}  // namespace

UrlRules::UrlRules(bool schemes, bool trailing_slash, const std::vector<std::string>& names,
                   const std::vector<std::string>& prefixes)
    : merge_schemes(schemes), merge_trailing_slash(trailing_slash), has_any_(!names.empty() || !prefixes.empty()) {
  for (const auto* list : {&names, &prefixes}) {
    const bool is_prefix = list == &prefixes;
    for (const std::string& start : *list) {
      if (start.empty()) {
        (is_prefix ? ignores_all_ : ignores_empty_) = true;
      } else {
        by_first_[start[0] & 127].push_back({start, is_prefix});
      }
    }
  }
}

UrlRules::Verdict UrlRules::judge(std::string_view name) const {
  if (!has_any_) return kCounts;
  for (const char c : name)
    if (static_cast<uint8_t>(c) >= 0x80) return kUnclear;  // its lower case may be a letter of ASCII
  if (ignores_all_ || (name.empty() && ignores_empty_)) return kIgnored;
  if (name.empty()) return kCounts;
  const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c | 0x20) : c; };
  for (const Pattern& pattern : by_first_[static_cast<int>(lower(name[0]))]) {
    if (pattern.is_prefix ? name.size() < pattern.start.size() : name.size() != pattern.start.size()) continue;
    size_t i = 0;
    while (i < pattern.start.size() && lower(name[i]) == pattern.start[i]) ++i;
    if (i == pattern.start.size()) return kIgnored;
  }
  return kCounts;
}

std::string_view canonicalise_url(std::string_view url, const UrlRules& rules, UrlScratch& scratch) {
  if (url.empty() || url.size() >= (1u << 30) || byte_at(url, url.size() - 1) >= 0x80)
    return {};                                           // the end may be white space, which is stripped
  if (scratch.canonical.size() < 4 * url.size() + 64) {  // a byte becomes three at most, a field without = one more
    scratch.canonical.resize(8 * url.size() + 64);
    scratch.decoded.resize(2 * url.size() + 64);
    scratch.url.resize(2 * url.size() + 64);
  }
  char* const copy = scratch.url.data();
  std::memcpy(copy, url.data(), url.size());
  std::memset(copy + url.size(), 0, kStep + 1);
  url = {copy, url.size()};
  char* out = scratch.canonical.data();
  size_t at = add_host(url, rules, out);
  if (at == 0) return {};
  at = add_path(url, at, rules, out);
  if (at == 0) return {};
  if (at < url.size() && url[at] == '?' && !add_query(url, at + 1, rules, scratch, out)) return {};
  return {scratch.canonical.data(), static_cast<size_t>(out - scratch.canonical.data())};
}

UrlKey hash_url(std::string_view canonical) {
  const auto* p = reinterpret_cast<const uint8_t*>(canonical.data());
  size_t left = canonical.size();
  uint64_t a = 0x243F6A8885A308D3u ^ left, b = 0x13198A2E03707344u + 0x9E3779B97F4A7C15u * left;
  const auto step = [&](uint64_t x, uint64_t y) {
    a = mix(a ^ x, y ^ 0xA4093822299F31D0u);
    b = mix(b ^ y, x ^ 0x082EFA98EC4E6C89u) + a;
  };
  for (; left >= 16; p += 16, left -= 16) {
    uint64_t x, y;
    std::memcpy(&x, p, 8);
    std::memcpy(&y, p + 8, 8);
    step(x, y);
  }
  uint64_t rest[2] = {0, 0};
  if (canonical.size() >= 16 && left > 0) {  // the last 16 bytes without those that had their turn: no copy of any size
    std::memcpy(rest, p + left - 16, 16);
    const size_t bits = 8 * (16 - left);
    rest[0] = bits >= 64 ? rest[1] >> (bits - 64) : rest[0] >> bits | rest[1] << (64 - bits);
    rest[1] = bits >= 64 ? 0 : rest[1] >> bits;
  } else {
    std::memcpy(rest, p, left);
  }
  step(rest[0], rest[1]);
  return {mix(a ^ 0x452821E638D01377u, b ^ 0xBE5466CF34E90C6Cu), mix(b ^ 0xC0AC29B7C97C50DDu, a ^ 0x3F84D5B5B5470917u)};
}

}  // namespace herdkern::text
