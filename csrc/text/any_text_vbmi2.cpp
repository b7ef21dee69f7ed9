// UTF-8 of Python's texts by vectors of 512 bits, for x86-64-v4 with VBMI2 (Zen 4, Ice Lake and later).
//
// Each code point becomes its bytes in a lane of its own, the first byte first; a compression then takes out the bytes
// that are not used. Those are zero, and no other than a first byte may be (U+0000), so one test finds them.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 on its own intrinsics
#include <immintrin.h>

#include "text/any_text.h"

namespace herdkern::text::vbmi2 {

Utf8End write_utf8(const AnyText& text, uint8_t* out);

namespace {

// first_bytes: a bit for the first byte of each code point that counts.
inline uint8_t* store_used(__m512i bytes, uint64_t first_bytes, uint8_t* out) {
  const uint64_t used = _mm512_test_epi8_mask(bytes, bytes) | first_bytes;
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi8(used, bytes));
  return out + __builtin_popcountll(used);
}

inline __m512i set_16(int value) { return _mm512_set1_epi16(short(value)); }
inline __m512i set_32(int value) { return _mm512_set1_epi32(value); }

// n of 32 code points below U+0800.
inline uint8_t* write_two(__m512i c, size_t n, uint8_t* out) {
  const __mmask32 is_two = _mm512_cmpge_epu16_mask(c, set_16(0x80));
  const __m512i last = _mm512_slli_epi16(_mm512_and_si512(c, set_16(0x3F)), 8);
  const __m512i two = _mm512_or_si512(_mm512_or_si512(_mm512_srli_epi16(c, 6), last), set_16(0x80C0));
  const uint64_t first_bytes = 0x5555555555555555 & (n < 32 ? (uint64_t(1) << 2 * n) - 1 : ~uint64_t(0));
  return store_used(_mm512_mask_mov_epi16(c, is_two, two), first_bytes, out);
}

// n of 16 code points; has_surrogate becomes true if one is a half of a surrogate pair.
inline uint8_t* write_four(__m512i c, size_t n, uint8_t* out, bool& has_surrogate) {
  const __mmask16 is_two = _mm512_cmpge_epu32_mask(c, set_32(0x80));
  const __mmask16 is_three = _mm512_cmpge_epu32_mask(c, set_32(0x800));
  const __mmask16 is_four = _mm512_cmpge_epu32_mask(c, set_32(0x10000));
  const __m512i low = set_32(0x3F), low_6 = _mm512_and_si512(c, low);
  const __m512i next_6 = _mm512_and_si512(_mm512_srli_epi32(c, 6), low);
  const __m512i two = _mm512_or_si512(_mm512_srli_epi32(c, 6), _mm512_slli_epi32(low_6, 8));
  __m512i bytes = _mm512_mask_or_epi32(c, is_two, two, set_32(0x80C0));
  const __m512i last_two = _mm512_or_si512(_mm512_slli_epi32(next_6, 8), _mm512_slli_epi32(low_6, 16));
  const __m512i three = _mm512_or_si512(_mm512_srli_epi32(c, 12), last_two);
  bytes = _mm512_mask_or_epi32(bytes, is_three, three, set_32(0x8080E0));
  if (is_four != 0) {
    const __m512i second = _mm512_and_si512(_mm512_srli_epi32(c, 12), low);
    const __m512i later = _mm512_or_si512(_mm512_slli_epi32(second, 8), _mm512_slli_epi32(last_two, 8));
    const __m512i four = _mm512_or_si512(_mm512_srli_epi32(c, 18), later);
    bytes = _mm512_mask_or_epi32(bytes, is_four, four, set_32(int(0x808080F0)));
  }
  has_surrogate |= _mm512_cmpeq_epi32_mask(_mm512_and_si512(c, set_32(~0x7FF)), set_32(0xD800)) != 0;
  return store_used(bytes, 0x1111111111111111 & (n < 16 ? (uint64_t(1) << 4 * n) - 1 : ~uint64_t(0)), out);
}

Utf8End write(const uint8_t* units, size_t size, uint8_t* out) {
  for (size_t i = 0; i < size; i += 64) {
    const size_t n = size - i < 64 ? size - i : 64;
    const __m512i c = _mm512_maskz_loadu_epi8(n < 64 ? (__mmask64(1) << n) - 1 : ~__mmask64(0), units + i);
    if (_mm512_movepi8_mask(c) == 0) {
      _mm512_storeu_si512(out, c);
      out += n;
      continue;
    }
    out = write_two(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(c)), n < 32 ? n : 32, out);
    if (n > 32) out = write_two(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(c, 1)), n - 32, out);
  }
  return {out, false};
}

Utf8End write(const uint16_t* units, size_t size, uint8_t* out) {
  bool has_surrogate = false;
  for (size_t i = 0; i < size; i += 32) {
    const size_t n = size - i < 32 ? size - i : 32;
    const __m512i c = _mm512_maskz_loadu_epi16(n < 32 ? (__mmask32(1) << n) - 1 : ~__mmask32(0), units + i);
    if (_mm512_test_epi16_mask(c, set_16(0xFF80)) == 0) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(c));
      out += n;
    } else if (_mm512_test_epi16_mask(c, set_16(0xF800)) == 0) {
      out = write_two(c, n, out);
    } else {
      out = write_four(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(c)), n < 16 ? n : 16, out, has_surrogate);
      if (n > 16) out = write_four(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(c, 1)), n - 16, out, has_surrogate);
    }
  }
  return {out, has_surrogate};
}

Utf8End write(const uint32_t* units, size_t size, uint8_t* out) {
  bool has_surrogate = false;
  for (size_t i = 0; i < size; i += 16) {
    const size_t n = size - i < 16 ? size - i : 16;
    const __m512i c = _mm512_maskz_loadu_epi32(__mmask16(n < 16 ? (1u << n) - 1 : 0xFFFF), units + i);
    if (_mm512_test_epi32_mask(c, set_32(~0x7F)) == 0) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(c));
      out += n;
    } else {
      out = write_four(c, n, out, has_surrogate);
    }
  }
  return {out, has_surrogate};
}

}  // namespace

Utf8End write_utf8(const AnyText& text, uint8_t* out) {
  if (text.unit_bytes == 1) return write(static_cast<const uint8_t*>(text.data), text.size, out);
  if (text.unit_bytes == 2) return write(static_cast<const uint16_t*>(text.data), text.size, out);
  return write(static_cast<const uint32_t*>(text.data), text.size, out);
}

}  // namespace herdkern::text::vbmi2
