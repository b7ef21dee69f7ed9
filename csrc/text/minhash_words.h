// What the splitter of MinHash's words is made of: 64 bytes of ASCII as masks, one code point, the hash of a word.
// Compiled once per x86-64 level (HK_MINHASH_LEVEL is its namespace).
#pragma once
#include <algorithm>

#include "text/minhash.h"
#if defined(HK_X86)
#include <immintrin.h>
#endif

namespace herdkern::text::HK_MINHASH_LEVEL {

struct BlockMasks {
  uint64_t word, high;  // bit i: byte i is an ASCII letter, digit or '_'; byte i is not ASCII
};

#if defined(__AVX512BW__)
inline BlockMasks classify_block(const uint8_t* in, uint8_t* out) {
  const __m512i v = _mm512_loadu_si512(in);
  const __m512i bit5 = _mm512_set1_epi8(0x20);
  const __m512i letter_index = _mm512_sub_epi8(_mm512_or_si512(v, bit5), _mm512_set1_epi8('a'));
  const __mmask64 letter = _mm512_cmplt_epu8_mask(letter_index, _mm512_set1_epi8(26));
  const __mmask64 digit = _mm512_cmplt_epu8_mask(_mm512_sub_epi8(v, _mm512_set1_epi8('0')), _mm512_set1_epi8(10));
  __m512i folded = _mm512_or_si512(v, _mm512_maskz_mov_epi8(letter, bit5));
  _mm512_storeu_si512(out, folded);
  return {letter | digit | _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8('_')), _mm512_movepi8_mask(v)};
}
#elif defined(__AVX2__)
inline BlockMasks classify_block(const uint8_t* in, uint8_t* out) {
  uint64_t word[2], high[2];
  for (int half = 0; half < 2; ++half) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + 32 * half));
    const __m256i bit5 = _mm256_set1_epi8(0x20);
    const __m256i letter_index = _mm256_sub_epi8(_mm256_or_si256(v, bit5), _mm256_set1_epi8('a'));
    const __m256i digit_index = _mm256_sub_epi8(v, _mm256_set1_epi8('0'));
    const __m256i letter = _mm256_cmpeq_epi8(_mm256_min_epu8(letter_index, _mm256_set1_epi8(25)), letter_index);
    const __m256i digit = _mm256_cmpeq_epi8(_mm256_min_epu8(digit_index, _mm256_set1_epi8(9)), digit_index);
    const __m256i underscore = _mm256_cmpeq_epi8(v, _mm256_set1_epi8('_'));
    __m256i folded = _mm256_or_si256(v, _mm256_and_si256(letter, bit5));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * half), folded);
    const __m256i parts = _mm256_or_si256(_mm256_or_si256(letter, digit), underscore);
    word[half] = static_cast<uint32_t>(_mm256_movemask_epi8(parts));
    high[half] = static_cast<uint32_t>(_mm256_movemask_epi8(v));
  }
  return {word[0] | word[1] << 32, high[0] | high[1] << 32};
}
#elif defined(__SSE2__)
inline BlockMasks classify_block(const uint8_t* in, uint8_t* out) {
  BlockMasks masks{0, 0};
  for (int quarter = 0; quarter < 4; ++quarter) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 16 * quarter));
    const __m128i bit5 = _mm_set1_epi8(0x20);
    const __m128i letter_index = _mm_sub_epi8(_mm_or_si128(v, bit5), _mm_set1_epi8('a'));
    const __m128i digit_index = _mm_sub_epi8(v, _mm_set1_epi8('0'));
    const __m128i letter = _mm_cmpeq_epi8(_mm_min_epu8(letter_index, _mm_set1_epi8(25)), letter_index);
    const __m128i digit = _mm_cmpeq_epi8(_mm_min_epu8(digit_index, _mm_set1_epi8(9)), digit_index);
    const __m128i underscore = _mm_cmpeq_epi8(v, _mm_set1_epi8('_'));
    __m128i folded = _mm_or_si128(v, _mm_and_si128(letter, bit5));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * quarter), folded);
    const uint64_t parts = _mm_movemask_epi8(_mm_or_si128(_mm_or_si128(letter, digit), underscore));
    masks.word |= parts << (16 * quarter);
    masks.high |= static_cast<uint64_t>(_mm_movemask_epi8(v)) << (16 * quarter);
  }
  return masks;
}
#else
inline BlockMasks classify_block(const uint8_t* in, uint8_t* out) {
  BlockMasks masks{0, 0};
  for (int i = 0; i < 64; ++i) {
    const uint8_t c = in[i];
    const bool letter = static_cast<uint8_t>((c | 0x20) - 'a') < 26, digit = static_cast<uint8_t>(c - '0') < 10;
    out[i] = letter ? c | 0x20 : c;
    masks.word |= static_cast<uint64_t>(letter || digit || c == '_') << i;
    masks.high |= static_cast<uint64_t>(c >> 7) << i;
  }
  return masks;
}
#endif

inline uint64_t load8(const uint8_t* p) {
  uint64_t x;
  std::memcpy(&x, p, 8);
  return x;
}

// Hash of size >= 1 bytes; 16 bytes from p on must be readable (what lies behind size does not count).
inline uint64_t hash_bytes(const uint8_t* p, int64_t size) {
  const uint64_t salt = kGolden * static_cast<uint64_t>(size);
  uint64_t x, y, h = salt;
  if (size <= 8) {
    x = load8(p) & (~uint64_t{0} >> (64 - 8 * size));
    y = 0;
  } else if (size <= 16) {
    x = load8(p);
    y = load8(p + 8) & (~uint64_t{0} >> (128 - 8 * size));
  } else {
    const uint8_t* last = p + size - 16;
    for (; p < last; p += 16) h = multiply_fold(load8(p) ^ h, load8(p + 8) ^ 0xE7037ED1A0B428DBu);
    x = load8(last);
    y = load8(last + 8);
  }
  return multiply_fold(x ^ h ^ 0xA0761D6478BD642Fu, y ^ salt ^ 0x8EBC6AF09C88C6E3u);
}

struct CodePoint {
  uint32_t value;
  int size;  // bytes
  WordClass word_class;
};

// The code point that starts at p (not ASCII). A byte that starts none counts as a letter of its own.
inline CodePoint decode(const uint8_t* p, const uint8_t* end, const WordTable& table) {
  const uint8_t lead = p[0];
  const auto trail = [&](int i) { return p + i < end && (p[i] & 0xC0) == 0x80; };
  uint32_t value = 0;
  int size = 1;
  if (lead >= 0xC2 && lead <= 0xDF && trail(1)) {
    value = (lead & 0x1Fu) << 6 | (p[1] & 0x3Fu);
    size = 2;
  } else if ((lead & 0xF0) == 0xE0 && trail(1) && trail(2)) {
    value = (lead & 0xFu) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
    size = value >= 0x800 && (value < 0xD800 || value > 0xDFFF) ? 3 : 1;
  } else if (lead >= 0xF0 && lead <= 0xF4 && trail(1) && trail(2) && trail(3)) {
    value = (lead & 7u) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu);
    size = value >= 0x10000 && value < 0x110000 ? 4 : 1;
  }
  if (size == 1) return {0, 1, kWordPart};
  return {value, size, static_cast<WordClass>(table.word_class[value])};
}

inline uint64_t low_bits(int count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

}  // namespace herdkern::text::HK_MINHASH_LEVEL
