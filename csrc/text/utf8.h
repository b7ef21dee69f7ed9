// Reading UTF-8 as Python's "surrogateescape" does: a byte b that is no part of well-formed UTF-8 (overlong forms,
// surrogates and code points above U+10FFFF included) is the code point U+DC00 + b, and the next byte starts afresh.
#pragma once
#include <cstdint>

namespace herdkern::text {

struct DecodedCodePoint {
  uint32_t code_point, num_bytes;
};

inline DecodedCodePoint decode_utf8(const uint8_t* p, const uint8_t* end) {
  const uint32_t lead = *p;
  if (lead < 0x80) return {lead, 1};
  const DecodedCodePoint malformed = {0xDC00 + lead, 1};
  const auto left = end - p;
  const auto tail = [p](int i) { return uint32_t(p[i]) ^ 0x80u; };  // below 0x40 for a continuation byte
  if (lead < 0xE0) {
    if (lead < 0xC2 || left < 2 || tail(1) >= 0x40) return malformed;
    return {(lead & 0x1F) << 6 | tail(1), 2};
  }
  if (lead < 0xF0) {
    if (left < 3 || (tail(1) | tail(2)) >= 0x40) return malformed;
    const uint32_t c = (lead & 0x0F) << 12 | tail(1) << 6 | tail(2);
    if (c < 0x800 || (c - 0xD800u) < 0x800u) return malformed;
    return {c, 3};
  }
  if (lead > 0xF4 || left < 4 || (tail(1) | tail(2) | tail(3)) >= 0x40) return malformed;
  const uint32_t c = (lead & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3);
  if (c < 0x10000 || c > 0x10FFFF) return malformed;
  return {c, 4};
}

}  // namespace herdkern::text
