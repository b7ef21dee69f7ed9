// JSON lines: see json_lines.h.
#include "text/json_lines.h"

#include "text/json_scan.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace herdkern::text {

namespace {

constexpr int kMaxDepth = 64;

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

// An object with a string under the key, the last one if there are several, and nothing behind it.
bool object_with(std::string_view line, std::string_view key, JsonString& text) {
  JsonScanner scan(line);
  bool found = false;
  if (!scan.is_after_white('{')) return false;
  scan.white();
  if (scan.is('}')) return false;
  do {
    JsonString name;
    scan.white();
    if (!scan.string(name) || name.has_escapes || !scan.is_after_white(':')) return false;
    scan.white();
    if (name.raw == key) {
      if (!scan.string(text)) return false;
      found = true;
    } else if (!pass_json_value(scan, kMaxDepth, nullptr)) {
      return false;
    }
  } while (scan.is_after_white(','));
  if (!scan.is('}')) return false;
  scan.white();
  return found && scan.at_end();
}

}  // namespace

JsonLine text_of_json_line(std::string_view line, std::string_view key, char*& scratch, std::string_view& text) {
  if (line.find_first_not_of(" \t\n\r\v\f") == std::string_view::npos) return JsonLine::kBlank;
  JsonString found;
  if (!is_utf8(line) || !object_with(line, key, found)) return JsonLine::kOther;
  text = found.raw;
  if (!found.has_escapes) return JsonLine::kText;
  bool is_good = false;
  char* end = unescape(found.raw, scratch, is_good);
  if (!is_good) return JsonLine::kOther;
  text = {scratch, size_t(end - scratch)};
  scratch = end;
  return JsonLine::kText;
}

}  // namespace herdkern::text
