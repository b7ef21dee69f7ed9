// UTF-8 of Python's texts by vectors of 256 bits, for x86-64-v3 (AVX2): the bytes of each code point in a lane of its
// own, the first byte first, and a shuffle from a table that pushes together those that count.
#include <immintrin.h>

#include <array>

#include "text/any_text.h"

namespace herdkern::text::avx2 {

Utf8End write_utf8(const AnyText& text, uint8_t* out);

namespace {

// How to push the bytes that count together: of 8 units of two bytes (bit i of the index: unit i is one byte), and of 4
// units of four bytes (bit i: unit i is one byte; bit 4 + i: it is at most two).
struct PackTables {
  alignas(16) std::array<std::array<uint8_t, 16>, 256> pairs, words;
  std::array<uint8_t, 256> pair_bytes, word_bytes;
};

constexpr PackTables make_pack_tables() {
  PackTables t{};
  for (unsigned index = 0; index < 256; ++index) {
    unsigned size = 0;
    for (unsigned i = 0; i < 8; ++i)
      for (unsigned byte = 0; byte < (index >> i & 1 ? 1u : 2u); ++byte) t.pairs[index][size++] = uint8_t(2 * i + byte);
    t.pair_bytes[index] = uint8_t(size);
    size = 0;
    for (unsigned i = 0; i < 4; ++i)
      for (unsigned byte = 0; byte < (index >> i & 1 ? 1u : index >> (4 + i) & 1 ? 2u : 3u); ++byte)
        t.words[index][size++] = uint8_t(4 * i + byte);
    t.word_bytes[index] = uint8_t(size);
  }
  return t;
}
constexpr PackTables kPack = make_pack_tables();

inline uint8_t* store_packed(__m128i bytes, const std::array<uint8_t, 16>& order, uint8_t size, uint8_t* out) {
  const __m128i shuffle = _mm_load_si128(reinterpret_cast<const __m128i*>(order.data()));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(bytes, shuffle));
  return out + size;
}

// 8 units below 0x800, some of two bytes. Writes 16 bytes.
inline uint8_t* write_pairs(__m128i units, uint8_t* out) {
  const __m128i is_one = _mm_cmpgt_epi16(_mm_set1_epi16(0x80), units);
  const __m128i first = _mm_or_si128(_mm_srli_epi16(units, 6), _mm_set1_epi16(0xC0));
  const __m128i last = _mm_or_si128(_mm_and_si128(units, _mm_set1_epi16(0x3F)), _mm_set1_epi16(0x80));
  const __m128i two = _mm_or_si128(first, _mm_slli_epi16(last, 8));
  const auto index = uint8_t(_mm_movemask_epi8(_mm_packs_epi16(is_one, is_one)));
  return store_packed(_mm_blendv_epi8(two, units, is_one), kPack.pairs[index], kPack.pair_bytes[index], out);
}

// 8 units of four bytes below 0x10000. Writes up to 28 bytes.
inline uint8_t* write_words(__m256i units, uint8_t* out) {
  const __m256i low = _mm256_set1_epi32(0x3F), tail = _mm256_set1_epi32(0x80);
  const __m256i is_one = _mm256_cmpgt_epi32(tail, units);
  const __m256i upto_two = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x800), units);
  const __m256i last = _mm256_or_si256(_mm256_and_si256(units, low), tail);
  const __m256i upper = _mm256_srli_epi32(units, 6);
  const __m256i two = _mm256_or_si256(_mm256_or_si256(upper, _mm256_set1_epi32(0xC0)), _mm256_slli_epi32(last, 8));
  const __m256i middle = _mm256_slli_epi32(_mm256_or_si256(_mm256_and_si256(upper, low), tail), 8);
  const __m256i first = _mm256_or_si256(_mm256_srli_epi32(units, 12), _mm256_set1_epi32(0xE0));
  const __m256i three = _mm256_or_si256(_mm256_or_si256(first, middle), _mm256_slli_epi32(last, 16));
  const __m256i words = _mm256_blendv_epi8(_mm256_blendv_epi8(three, two, upto_two), units, is_one);
  const auto one = unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(is_one)));
  const auto some = unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(upto_two)));
  const unsigned lower = (one & 15) | (some & 15) << 4, higher = one >> 4 | (some & 0xF0);
  out = store_packed(_mm256_castsi256_si128(words), kPack.words[lower], kPack.word_bytes[lower], out);
  return store_packed(_mm256_extracti128_si256(words, 1), kPack.words[higher], kPack.word_bytes[higher], out);
}

// write_16: 16 units, at most 52 bytes written. Each returns the end of what counts; `surrogates` is not zero any more
// once one was met.
inline uint8_t* write_16(const uint8_t* units, uint8_t* out, __m256i&) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(units));
  if (_mm_movemask_epi8(bytes) == 0) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
    return out + 16;
  }
  const __m256i wide = _mm256_cvtepu8_epi16(bytes);
  out = write_pairs(_mm256_castsi256_si128(wide), out);
  return write_pairs(_mm256_extracti128_si256(wide, 1), out);
}

inline uint8_t* write_16(const uint16_t* units, uint8_t* out, __m256i& surrogates) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(units));
  const __m256i upper_5 = _mm256_set1_epi16(int16_t(0xF800));
  const __m128i lower = _mm256_castsi256_si128(v), higher = _mm256_extracti128_si256(v, 1);
  if (_mm256_testz_si256(v, _mm256_set1_epi16(int16_t(0xFF80)))) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(lower, higher));
    return out + 16;
  }
  if (_mm256_testz_si256(v, upper_5)) return write_pairs(higher, write_pairs(lower, out));
  const __m256i is_surrogate = _mm256_cmpeq_epi16(_mm256_and_si256(v, upper_5), _mm256_set1_epi16(int16_t(0xD800)));
  surrogates = _mm256_or_si256(surrogates, is_surrogate);
  return write_words(_mm256_cvtepu16_epi32(higher), write_words(_mm256_cvtepu16_epi32(lower), out));
}

inline uint8_t* write_16(const uint32_t* units, uint8_t* out, __m256i& surrogates) {
  const __m256i upper_21 = _mm256_set1_epi32(~0x7FF);
  for (int half = 0; half < 2; ++half) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(units + 8 * half));
    const __m256i is_surrogate = _mm256_cmpeq_epi32(_mm256_and_si256(v, upper_21), _mm256_set1_epi32(0xD800));
    surrogates = _mm256_or_si256(surrogates, is_surrogate);
    if (_mm256_testz_si256(v, _mm256_set1_epi32(int(0xFFFF0000)))) {
      out = write_words(v, out);
    } else {
      out = text::write_utf8(units + 8 * half, 8, out).end;
    }
  }
  return out;
}

template <typename Unit>
Utf8End write(const void* text, size_t size, uint8_t* out) {
  const Unit* units = static_cast<const Unit*>(text);
  __m256i surrogates = _mm256_setzero_si256();
  size_t i = 0;
  for (; i + 16 <= size; i += 16) out = write_16(units + i, out, surrogates);
  const Utf8End rest = text::write_utf8(units + i, size - i, out);
  return {rest.end, rest.has_surrogate || !_mm256_testz_si256(surrogates, surrogates)};
}

}  // namespace

Utf8End write_utf8(const AnyText& text, uint8_t* out) {
  if (text.unit_bytes == 1) return write<uint8_t>(text.data, text.size, out);
  if (text.unit_bytes == 2) return write<uint16_t>(text.data, text.size, out);
  return write<uint32_t>(text.data, text.size, out);
}

}  // namespace herdkern::text::avx2
