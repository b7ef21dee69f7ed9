// UTF-8 at the speed of memory: is a text well-formed, how many code points has it, and UTF-8 from code points of one,
// two or four bytes. Compiled once per x86-64 level (HK_MINHASH_LEVEL is its namespace); all levels give the same.
#pragma once
#include <array>

#include "text/any_text.h"
#include "text/minhash.h"
#if defined(HK_X86)
#include <immintrin.h>
#endif

namespace herdkern::text::HK_MINHASH_LEVEL {

// The sequence at p, not ASCII, is well-formed by table 3-7 of the Unicode standard: its length, else 0.
inline int sequence_size(const uint8_t* p, const uint8_t* end) {
  const auto tail = [&](int i) { return (p[i] & 0xC0) == 0x80; };
  const uint8_t lead = p[0];
  const auto left = end - p;
  if (lead >= 0xC2 && lead < 0xE0) return left >= 2 && tail(1) ? 2 : 0;
  if (left < 3) return 0;
  if (lead >= 0xE0 && lead < 0xF0) {
    const bool bad = (lead == 0xE0 && p[1] < 0xA0) || (lead == 0xED && p[1] >= 0xA0);
    return !bad && tail(1) && tail(2) ? 3 : 0;
  }
  if (lead < 0xF0 || lead >= 0xF5 || left < 4) return 0;
  const bool bad = (lead == 0xF0 && p[1] < 0x90) || (lead == 0xF4 && p[1] >= 0x90);
  return !bad && tail(1) && tail(2) && tail(3) ? 4 : 0;
}

// May write up to 3 bytes behind the end that it returns.
template <typename Unit>
inline uint8_t* encode_each(const Unit* units, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    unsigned num_bytes;
    store_little_endian(utf8_word<sizeof(Unit)>(units[i], num_bytes), out);
    out += num_bytes;
  }
  return out;
}

#if defined(__AVX2__)

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
      for (unsigned byte = 0; byte < (index >> i & 1 ? 1u : 2u); ++byte)
        t.pairs[index][size++] = static_cast<uint8_t>(2 * i + byte);
    t.pair_bytes[index] = static_cast<uint8_t>(size);
    size = 0;
    for (unsigned i = 0; i < 4; ++i)
      for (unsigned byte = 0; byte < (index >> i & 1 ? 1u : index >> (4 + i) & 1 ? 2u : 3u); ++byte)
        t.words[index][size++] = static_cast<uint8_t>(4 * i + byte);
    t.word_bytes[index] = static_cast<uint8_t>(size);
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
inline uint8_t* encode_pairs(__m128i units, uint8_t* out) {
  const __m128i is_one = _mm_cmpgt_epi16(_mm_set1_epi16(0x80), units);
  const __m128i first = _mm_or_si128(_mm_srli_epi16(units, 6), _mm_set1_epi16(0xC0));
  const __m128i last = _mm_or_si128(_mm_and_si128(units, _mm_set1_epi16(0x3F)), _mm_set1_epi16(0x80));
  const __m128i two = _mm_or_si128(first, _mm_slli_epi16(last, 8));
  const auto index = static_cast<uint8_t>(_mm_movemask_epi8(_mm_packs_epi16(is_one, is_one)));
  return store_packed(_mm_blendv_epi8(two, units, is_one), kPack.pairs[index], kPack.pair_bytes[index], out);
}

// 8 units of four bytes below 0x10000. Writes up to 28 bytes.
inline uint8_t* encode_words(__m256i units, uint8_t* out) {
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
  const auto one = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(is_one)));
  const auto some = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(upto_two)));
  const unsigned lower = (one & 15) | (some & 15) << 4, higher = one >> 4 | (some & 0xF0);
  out = store_packed(_mm256_castsi256_si128(words), kPack.words[lower], kPack.word_bytes[lower], out);
  return store_packed(_mm256_extracti128_si256(words, 1), kPack.words[higher], kPack.word_bytes[higher], out);
}

// 16 units; writes up to 52 bytes. Each returns the end of what counts.
inline uint8_t* encode_16(const uint8_t* units, uint8_t* out) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(units));
  if (_mm_movemask_epi8(bytes) == 0) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
    return out + 16;
  }
  const __m256i wide = _mm256_cvtepu8_epi16(bytes);
  out = encode_pairs(_mm256_castsi256_si128(wide), out);
  return encode_pairs(_mm256_extracti128_si256(wide, 1), out);
}

inline uint8_t* encode_16(const uint16_t* units, uint8_t* out) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(units));
  const __m128i lower = _mm256_castsi256_si128(v), higher = _mm256_extracti128_si256(v, 1);
  if (_mm256_testz_si256(v, _mm256_set1_epi16(static_cast<int16_t>(0xFF80)))) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(lower, higher));
    return out + 16;
  }
  if (_mm256_testz_si256(v, _mm256_set1_epi16(static_cast<int16_t>(0xF800))))
    return encode_pairs(higher, encode_pairs(lower, out));
  return encode_words(_mm256_cvtepu16_epi32(higher), encode_words(_mm256_cvtepu16_epi32(lower), out));
}

inline uint8_t* encode_16(const uint32_t* units, uint8_t* out) {
  for (int half = 0; half < 2; ++half) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(units + 8 * half));
    if (_mm256_testz_si256(v, _mm256_set1_epi32(static_cast<int32_t>(0xFFFF0000)))) {
      out = encode_words(v, out);
    } else {
      out = encode_each(units + 8 * half, 8, out);
    }
  }
  return out;
}

#else

template <typename Unit>
inline uint8_t* encode_16(const Unit* units, uint8_t* out) {
  uint32_t all = 0;
  for (int i = 0; i < 16; ++i) all |= units[i];
  if (all >= 0x80) return encode_each(units, 16, out);
  for (int i = 0; i < 16; ++i) out[i] = static_cast<uint8_t>(units[i]);
  return out + 16;
}

#endif

template <typename Unit>
inline uint8_t* encode_units(const Unit* units, int64_t count, uint8_t* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) out = encode_16(units + i, out);
  return encode_each(units + i, count - i, out);
}

uint8_t* encode(const void* units, int64_t count, int unit_bytes, uint8_t* out) {
  if (unit_bytes == 1) return encode_units(static_cast<const uint8_t*>(units), count, out);
  if (unit_bytes == 2) return encode_units(static_cast<const uint16_t*>(units), count, out);
  return encode_units(static_cast<const uint32_t*>(units), count, out);
}

#if defined(__AVX2__)

// What is wrong with pairs of neighbouring bytes, looked up by three of their four halves: a bit that all three have is
// an error. Source: Keiser and Lemire, Validating UTF-8 in less than one instruction per byte (arXiv:2010.03090).
struct Utf8Check {
  static constexpr uint8_t kShort = 1, kLong = 2, kOverlong3 = 4, kLarge = 8, kSurrogate = 16, kOverlong2 = 32,
                           kOverlong4 = 64 /* or above U+13FFFF */, kTails = 128, kCarry = kShort | kLong | kTails;

  static __m256i table(const uint8_t (&entries)[16]) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
  }
  static __m256i upper(__m256i v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15)); }

  template <int kBack>
  __m256i behind(__m256i v) const {  // v moved up by kBack bytes, the last ones of the block before coming in
    return _mm256_alignr_epi8(v, _mm256_permute2x128_si256(before, v, 0x21), 16 - kBack);
  }

  void add(__m256i v) {
    static constexpr uint8_t kFirstUpper[16] = {kLong,
                                                kLong,
                                                kLong,
                                                kLong,
                                                kLong,
                                                kLong,
                                                kLong,
                                                kLong,
                                                kTails,
                                                kTails,
                                                kTails,
                                                kTails,
                                                kShort | kOverlong2,
                                                kShort,
                                                kShort | kOverlong3 | kSurrogate,
                                                kShort | kLarge | kOverlong4};
    static constexpr uint8_t kBig = kCarry | kLarge | kOverlong4;
    static constexpr uint8_t kFirstLower[16] = {kCarry | kOverlong2 | kOverlong3 | kOverlong4,
                                                kCarry | kOverlong2,
                                                kCarry,
                                                kCarry,
                                                kCarry | kLarge,
                                                kBig,
                                                kBig,
                                                kBig,
                                                kBig,
                                                kBig,
                                                kBig,
                                                kBig,
                                                kBig,
                                                kBig | kSurrogate,
                                                kBig,
                                                kBig};
    static constexpr uint8_t kTail = kLong | kOverlong2 | kTails;
    static constexpr uint8_t kSecondUpper[16] = {kShort,
                                                 kShort,
                                                 kShort,
                                                 kShort,
                                                 kShort,
                                                 kShort,
                                                 kShort,
                                                 kShort,
                                                 kTail | kOverlong3 | kOverlong4,
                                                 kTail | kOverlong3 | kLarge,
                                                 kTail | kSurrogate | kLarge,
                                                 kTail | kSurrogate | kLarge,
                                                 kShort,
                                                 kShort,
                                                 kShort,
                                                 kShort};
    const __m256i first = behind<1>(v);
    const __m256i wrong = _mm256_and_si256(
        _mm256_and_si256(_mm256_shuffle_epi8(table(kFirstUpper), upper(first)),
                         _mm256_shuffle_epi8(table(kFirstLower), _mm256_and_si256(first, _mm256_set1_epi8(15)))),
        _mm256_shuffle_epi8(table(kSecondUpper), upper(v)));
    // The third and fourth bytes of a sequence must follow a tail: there, and only there, kTails is right.
    const __m256i third = _mm256_subs_epu8(behind<2>(v), _mm256_set1_epi8(0xE0 - 0x80));
    const __m256i fourth = _mm256_subs_epu8(behind<3>(v), _mm256_set1_epi8(static_cast<int8_t>(0xF0 - 0x80)));
    const __m256i must = _mm256_and_si256(_mm256_or_si256(third, fourth), _mm256_set1_epi8(static_cast<int8_t>(0x80)));
    errors = _mm256_or_si256(errors, _mm256_xor_si256(must, wrong));
    before = v;
  }
  bool is_good() const { return _mm256_testz_si256(errors, errors); }

  __m256i errors = _mm256_setzero_si256(), before = _mm256_setzero_si256();
};

bool is_utf8(const uint8_t* p, int64_t size) {
  Utf8Check check;
  const uint8_t* end = p + size;
  bool any = false;  // something that is not ASCII since the last look at the blocks
  for (; end - p >= 64; p += 64) {
    const __m256i lower = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i higher = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32));
    const bool is_ascii = _mm256_movemask_epi8(_mm256_or_si256(lower, higher)) == 0;
    if (is_ascii && !any) continue;
    check.add(lower);
    check.add(higher);
    any = !is_ascii;
  }
  alignas(32) uint8_t rest[96] = {};  // with zeros behind it: a sequence that is cut off is too short
  std::memcpy(rest, p, static_cast<size_t>(end - p));
  for (int block = 0; block < 3; ++block)
    check.add(_mm256_load_si256(reinterpret_cast<const __m256i*>(rest + 32 * block)));
  return check.is_good();
}

int64_t count_code_points(const uint8_t* p, int64_t size) {
  const uint8_t* end = p + size;
  __m256i sums = _mm256_setzero_si256();
  while (end - p >= 32) {
    const int64_t blocks = std::min<int64_t>((end - p) / 32, 255);
    __m256i counts = _mm256_setzero_si256();
    for (int64_t i = 0; i < blocks; ++i, p += 32) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      counts = _mm256_sub_epi8(counts, _mm256_cmpgt_epi8(v, _mm256_set1_epi8(-65)));
    }
    sums = _mm256_add_epi64(sums, _mm256_sad_epu8(counts, _mm256_setzero_si256()));
  }
  int64_t lanes[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sums);
  int64_t count = lanes[0] + lanes[1] + lanes[2] + lanes[3];
  for (; p < end; ++p) count += (*p & 0xC0) != 0x80;
  return count;
}

#else

bool is_utf8(const uint8_t* p, int64_t size) {
  const uint8_t* end = p + size;
  while (p < end) {
    uint64_t eight;
    for (; end - p >= 8; p += 8) {
      std::memcpy(&eight, p, 8);
      if (eight & 0x8080808080808080u) break;
    }
    for (int i = 0; i < 8 && p < end; ++i) {
      const int bytes = *p < 0x80 ? 1 : sequence_size(p, end);
      if (bytes == 0) return false;
      p += bytes;
    }
  }
  return true;
}

int64_t count_code_points(const uint8_t* p, int64_t size) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < size; begin += 128) {  // in pieces whose count fits a byte: sixteen at a time
    const int64_t end = std::min(size, begin + 128);
    uint8_t piece = 0;
    for (int64_t i = begin; i < end; ++i) piece = static_cast<uint8_t>(piece + ((p[i] & 0xC0) != 0x80));
    count += piece;
  }
  return count;
}

#endif

}  // namespace herdkern::text::HK_MINHASH_LEVEL
