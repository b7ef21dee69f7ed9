// A text as its owner holds it: UTF-8, or the code points of a Python str in units of one, two or four bytes. Threads
// turn it into UTF-8 themselves, so that this costs no time in which one thread works alone.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace herdkern::text {

struct TextRef {
  const void* data = nullptr;
  size_t length = 0;  // in units
  int unit = 0;       // bytes of a code point: 1 Latin-1, 2 UCS-2, 4 UCS-4; 0: the bytes are UTF-8

  // What to_utf8 may write.
  size_t max_written() const { return unit == 0 ? 0 : length * size_t(unit == 4 ? 4 : unit + 1); }
  size_t num_bytes() const { return length * size_t(unit == 0 ? 1 : unit); }
};

inline char* put_code_point(uint32_t c, char* out) {
  const auto put = [&](uint32_t byte) { *out++ = char(uint8_t(byte)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xC0 | c >> 6), put(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    put(0xE0 | c >> 12), put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
  } else {
    put(0xF0 | c >> 18), put(0x80 | (c >> 12 & 0x3F)), put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
  }
  return out;
}

template <typename Unit>
char* units_to_utf8(const Unit* p, size_t length, char* out) {
  const Unit* end = p + length;
  while (p < end) {
    for (; end - p >= 8; p += 8, out += 8) {  // ASCII, eight at a time
      Unit any = 0;
      for (int i = 0; i < 8; ++i) any = Unit(any | p[i]);
      if (any >= 0x80) break;
      for (int i = 0; i < 8; ++i) out[i] = char(p[i]);
    }
    const Unit* stop = end - p < 8 ? end : p + 8;
    while (p < stop) out = put_code_point(*p++, out);
  }
  return out;
}

// The text as UTF-8: in place, or written to `out`, which then stands behind it.
inline std::string_view to_utf8(const TextRef& text, char*& out) {
  if (text.unit == 0) return {static_cast<const char*>(text.data), text.length};
  char* const begin = out;
  if (text.unit == 1) out = units_to_utf8(static_cast<const uint8_t*>(text.data), text.length, out);
  if (text.unit == 2) out = units_to_utf8(static_cast<const uint16_t*>(text.data), text.length, out);
  if (text.unit == 4) out = units_to_utf8(static_cast<const uint32_t*>(text.data), text.length, out);
  return {begin, size_t(out - begin)};
}

template <typename Unit>
size_t first_surrogate(const Unit* units, size_t length) {
  constexpr size_t kBlock = 256;
  for (size_t begin = 0; begin < length; begin += kBlock) {
    const size_t end = length - begin < kBlock ? length : begin + kBlock;
    bool any = false;
    for (size_t i = begin; i < end; ++i) any |= (units[i] & Unit(~Unit(0x7FF))) == 0xD800;
    for (size_t i = begin; any && i < end; ++i) {
      if ((units[i] & Unit(~Unit(0x7FF))) == 0xD800) return i;
    }
  }
  return length;
}

// The place of the first surrogate, which UTF-8 cannot hold; `length` if there is none.
inline size_t first_surrogate(const TextRef& text) {
  if (text.unit == 2) return first_surrogate(static_cast<const uint16_t*>(text.data), text.length);
  if (text.unit == 4) return first_surrogate(static_cast<const uint32_t*>(text.data), text.length);
  return text.length;
}

}  // namespace herdkern::text
