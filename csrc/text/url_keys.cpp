#include "text/url_keys.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "text/word_key.h"

namespace herdkern::text {

namespace {

enum UrlByte : uint8_t {
  kAsk,         // needs other rules
  kUnreserved,  // stands for itself everywhere
  kInPath,      // stands for itself in a path, also where it was encoded
  kQuoted,      // is encoded in a path
};

// Of every byte, as it stands in a path. Not here: / and % (of their own), ; (parameters), what versions of w3lib treat
// differently ([ ] |), and what the URL standard rewrites (\).
constexpr std::array<uint8_t, 256> make_path_bytes() {
  std::array<uint8_t, 256> kinds{};
  for (int c = 0; c < 128; ++c) {
    const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'), digit = c >= '0' && c <= '9';
    kinds[c] = letter || digit || c == '-' || c == '_' || c == '~' || c == '.' ? kUnreserved : kAsk;
  }
  for (const char c : {'!', '$', '&', '\'', '(', ')', '*', '+', ',', '=', ':', '@'})
    kinds[static_cast<int>(c)] = kInPath;
  for (const char c : {'"', '<', '>', '^', '`', '{', '}'}) kinds[static_cast<int>(c)] = kQuoted;
  for (int c = 128; c < 256; ++c) kinds[c] = kQuoted;
  return kinds;
}
constexpr std::array<uint8_t, 256> kPathBytes = make_path_bytes();

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

void add_escape(std::string& out, uint8_t c) {
  const char code[3] = {'%', "0123456789ABCDEF"[c >> 4], "0123456789ABCDEF"[c & 15]};
  out.append(code, 3);
}

// Scheme and host with its port, up to the path; place of the path, or 0.
size_t add_host(std::string_view url, const UrlRules& rules, std::string& out) {
  const auto lower = [&](size_t i) { return static_cast<uint8_t>(byte_at(url, i) | 0x20); };
  if (url.size() < 8 || lower(0) != 'h' || lower(1) != 't' || lower(2) != 't' || lower(3) != 'p') return 0;
  const bool secure = lower(4) == 's';
  size_t at = secure ? 5 : 4;
  if (url.substr(at, 3) != "://") return 0;
  at += 3;
  out = secure && !rules.merge_schemes ? "https://" : "http://";
  const size_t host = out.size();
  for (; at < url.size(); ++at) {
    const uint8_t c = byte_at(url, at);
    const uint8_t small = c | 0x20;
    if (static_cast<uint8_t>(small - 'a') < 26 && c < 0x80) {
      out += static_cast<char>(small);
    } else if (static_cast<uint8_t>(c - '0') < 10 || c == '.' || c == '-' || c == '_') {
      out += static_cast<char>(c);
    } else {
      break;
    }
  }
  while (out.size() > host && out.back() == '.') out.pop_back();
  if (out.size() == host) return 0;
  if (at < url.size() && url[at] == ':') {
    const size_t first = ++at;
    int port = 0;
    while (at < url.size() && static_cast<uint8_t>(url[at] - '0') < 10 && at - first < 5)
      port = 10 * port + url[at++] - '0';
    if (at == first || url[first] == '0' || port > 65535) return 0;
    if (port != (secure ? 443 : 80)) out.append(1, ':').append(std::to_string(port));
  }
  return at == url.size() || url[at] == '/' || url[at] == '?' || url[at] == '#' ? at : 0;
}

// The path from `at` on; place of what comes behind it, or 0.
size_t add_path(std::string_view url, size_t at, const UrlRules& rules, std::string& out) {
  const size_t begin = out.size();
  bool after_slash = false;
  for (; at < url.size(); ++at) {
    uint8_t c = byte_at(url, at);
    if (c == '/') {
      out += '/';
      after_slash = true;
      continue;
    }
    if (c == '?' || c == '#') break;
    if (c == '%') {
      const int value = escaped(url, at);
      if (value < 0 || value == '.') return 0;
      c = static_cast<uint8_t>(value);
      if (kPathBytes[c] == kAsk && c != ' ') return 0;
      at += 2;
    } else if (kPathBytes[c] == kAsk || (c == '.' && after_slash)) {
      return 0;
    }
    after_slash = false;
    if (kPathBytes[c] == kUnreserved || kPathBytes[c] == kInPath) {
      out += static_cast<char>(c);
    } else {
      add_escape(out, c);
    }
  }
  if (rules.merge_trailing_slash)
    while (out.size() > begin && out.back() == '/') out.pop_back();
  if (out.size() == begin) out += '/';
  return at;
}

enum NameVerdict { kCounts, kIgnored, kUnclear };

NameVerdict judge_name(std::string_view name, const UrlRules& rules) {
  if (rules.ignored_names.empty() && rules.ignored_prefixes.empty()) return kCounts;
  char small[64];
  const size_t size = std::min(name.size(), sizeof(small));
  for (size_t i = 0; i < name.size(); ++i) {
    const uint8_t c = byte_at(name, i);
    if (c >= 0x80) return kUnclear;  // lower case may lead to a letter of ASCII
    if (i < size) small[i] = static_cast<char>(c >= 'A' && c <= 'Z' ? c | 0x20 : c);
  }
  for (const std::string& ignored : rules.ignored_names)
    if (ignored.size() == name.size() && ignored.compare(0, size, small, size) == 0 && name.size() <= sizeof(small))
      return kIgnored;
  for (const std::string& prefix : rules.ignored_prefixes)
    if (prefix.size() <= size && std::memcmp(prefix.data(), small, prefix.size()) == 0) return kIgnored;
  return kCounts;
}

// Appends url[at...) up to `stop` characters, decoded. Place of the stop, or npos.
size_t decode_part(std::string_view url, size_t at, bool is_name, std::string& decoded) {
  for (; at < url.size(); ++at) {
    const uint8_t c = byte_at(url, at);
    if (c == '&' || c == '#' || (c == '=' && is_name)) break;
    if (c == '%') {
      const int value = escaped(url, at);
      if (value < 0) return std::string_view::npos;
      decoded += static_cast<char>(value);
      at += 2;
    } else if (c <= 0x20 || c == 0x7F) {
      return std::string_view::npos;
    } else {
      decoded += c == '+' ? ' ' : static_cast<char>(c);
    }
  }
  return at;
}

void add_quoted(std::string_view text, std::string& out) {
  for (const char c : text) {
    if (kPathBytes[static_cast<uint8_t>(c)] == kUnreserved) {
      out += c;
    } else if (c == ' ') {
      out += '+';
    } else {
      add_escape(out, static_cast<uint8_t>(c));
    }
  }
}

// The query from `at` on, sorted, without parameters that do not count. False if other rules are needed.
bool add_query(std::string_view url, size_t at, const UrlRules& rules, UrlScratch& scratch) {
  std::string& decoded = scratch.decoded;
  decoded.clear();
  scratch.fields.clear();
  while (at < url.size() && url[at] != '#') {
    UrlScratch::Field field{decoded.size(), 0, 0};
    const size_t begin = at;
    at = decode_part(url, at, true, decoded);
    if (at == std::string_view::npos) return false;
    field.value = decoded.size();
    if (at < url.size() && url[at] == '=') {
      at = decode_part(url, at + 1, false, decoded);
      if (at == std::string_view::npos) return false;
    }
    field.end = decoded.size();
    const bool is_empty = at == begin;
    if (at < url.size() && url[at] == '&') ++at;
    if (is_empty) continue;
    const NameVerdict verdict =
        judge_name(std::string_view(decoded).substr(field.name, field.value - field.name), rules);
    if (verdict == kUnclear) return false;
    if (verdict == kCounts) scratch.fields.push_back(field);
  }
  const std::string_view all = decoded;
  const auto name = [&](const UrlScratch::Field& f) { return all.substr(f.name, f.value - f.name); };
  const auto value = [&](const UrlScratch::Field& f) { return all.substr(f.value, f.end - f.value); };
  if (scratch.fields.size() > 1)
    std::sort(scratch.fields.begin(), scratch.fields.end(), [&](const auto& a, const auto& b) {
      const int order = name(a).compare(name(b));
      return order ? order < 0 : value(a) < value(b);
    });
  char mark = '?';
  for (const UrlScratch::Field& field : scratch.fields) {
    scratch.canonical += mark;
    add_quoted(name(field), scratch.canonical);
    scratch.canonical += '=';
    add_quoted(value(field), scratch.canonical);
    mark = '&';
  }
  return true;
}

}  // namespace

bool canonicalise_url(std::string_view url, const UrlRules& rules, UrlScratch& scratch) {
  if (url.empty() || byte_at(url, url.size() - 1) >= 0x80) return false;  // may be white space, which is stripped
  size_t at = add_host(url, rules, scratch.canonical);
  if (at == 0) return false;
  at = add_path(url, at, rules, scratch.canonical);
  if (at == 0) return false;
  return at == url.size() || url[at] == '#' || add_query(url, at + 1, rules, scratch);
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
  std::memcpy(rest, p, left);
  step(rest[0], rest[1]);
  return {mix(a ^ 0x452821E638D01377u, b ^ 0xBE5466CF34E90C6Cu), mix(b ^ 0xC0AC29B7C97C50DDu, a ^ 0x3F84D5B5B5470917u)};
}

}  // namespace herdkern::text
