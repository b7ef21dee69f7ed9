// UTF-8 at the speed of memory: is a text well-formed, and how many code points has it. Compiled once per x86-64 level
// (HK_MINHASH_LEVEL is its namespace); all levels give the same.
#pragma once
#include <algorithm>
#include <cstring>

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
