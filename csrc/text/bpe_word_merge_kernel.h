// The body of merge_word, compiled once per x86-64 level (HK_MERGE_LEVEL names it, and its namespace). See
// bpe_word_merge.h. Everything here has internal linkage or lies in the level's namespace.
#pragma once
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "text/bpe_word_merge.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 on its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace herdkern::text::HK_MERGE_LEVEL {

namespace {

constexpr int32_t kNoMerge = 0x7FFFFFFF;

// For each place of a word what its part and the next would make: rank << 6 | place, or kNoMerge. The smallest is the
// leftmost of the lowest rank. In registers where they are wide enough: a vector read from memory would have to wait
// for the numbers written just before.
template <size_t kPlaces>
struct Pairs {
#if defined(__AVX512F__)
  __m512i values[kPlaces / 16];
  Pairs(const int32_t* from, uint64_t used) {
    const __m512i none = _mm512_set1_epi32(kNoMerge);
    for (size_t i = 0; i < kPlaces / 16; ++i) {
      values[i] = _mm512_mask_load_epi32(none, __mmask16(used >> 16 * i), from + 16 * i);
    }
  }
  int32_t lowest() const {
    __m512i all = values[0];
    for (size_t i = 1; i < kPlaces / 16; ++i) all = _mm512_min_epi32(all, values[i]);
    const __m256i half = _mm256_min_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    __m128i few = _mm_min_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    few = _mm_min_epi32(few, _mm_shuffle_epi32(few, 0x4E));
    return _mm_cvtsi128_si32(_mm_min_epi32(few, _mm_shuffle_epi32(few, 0xB1)));
  }
  void set(size_t place, int32_t value) {
    const uint64_t bit = uint64_t(1) << place;
    for (size_t i = 0; i < kPlaces / 16; ++i) {
      values[i] = _mm512_mask_set1_epi32(values[i], __mmask16(bit >> 16 * i), value);
    }
  }
#else
  int32_t values[kPlaces];
  Pairs(const int32_t* from, uint64_t used) {
    for (size_t i = 0; i < kPlaces; ++i) values[i] = used >> i & 1 ? from[i] : kNoMerge;
  }
  int32_t lowest() const {
    int32_t found[8] = {kNoMerge, kNoMerge, kNoMerge, kNoMerge, kNoMerge, kNoMerge, kNoMerge, kNoMerge};
    for (size_t i = 0; i < kPlaces; i += 8) {
      for (size_t k = 0; k < 8; ++k) found[k] = found[k] < values[i + k] ? found[k] : values[i + k];
    }
    for (size_t width = 4; width > 0; width /= 2) {
      for (size_t k = 0; k < width; ++k) found[k] = found[k] < found[k + width] ? found[k] : found[k + width];
    }
    return found[0];
  }
  void set(size_t place, int32_t value) { values[place] = value; }
#endif
};

// One bit for each slot with this key: at most one.
inline unsigned slots_with(const MergeTable::Bucket& bucket, uint64_t key) {
#if defined(__AVX2__)
  const __m256i slots = _mm256_load_si256(reinterpret_cast<const __m256i*>(bucket.slots));
  const __m256i keys = _mm256_srli_epi64(slots, MergeTable::kIdBits);
  return unsigned(_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(keys, _mm256_set1_epi64x(int64_t(key))))));
#else
  unsigned found = 0;
  for (size_t i = 0; i < MergeTable::kSlots; ++i) found |= unsigned(bucket.slots[i] >> MergeTable::kIdBits == key) << i;
  return found;
#endif
}

// What the part at `place` makes with the one behind it: rank << 6 | place, or kNoMerge. Without a branch on whether
// there is such a token, which could not be foreseen.
inline int32_t pair_value(const MergeTable& table, uint32_t left, uint32_t right, size_t place) {
  const uint64_t key = MergeTable::key_of(left, right), hash = MergeTable::hash_of(key);
  const uint64_t filter = table.filter(hash);
  const MergeTable::Bucket& bucket = table.bucket(hash, filter);
  const unsigned found = slots_with(bucket, key);
  const uint32_t is_none = 0u - uint32_t(found == 0);
  if (__builtin_expect((bucket.slots[MergeTable::kSlots - 1] & filter & (0 - uint64_t(is_none & 1))) != 0, 0)) {
    const uint32_t other = table.find(key);
    return other == kNoToken ? kNoMerge : int32_t(other << 6 | place);
  }
  const auto id = uint32_t(bucket.slots[__builtin_ctz(found | 1u << (MergeTable::kSlots - 1))] & MergeTable::kIdMask);
  return int32_t((id << 6 | uint32_t(place)) | is_none) & kNoMerge;
}

// Byte i of the word is at place i + 1. A part is known by the place of its first byte; a part that goes with no other
// lies before the word and one behind it, so that every part has two neighbours.
template <size_t kPlaces>
size_t merge(const MergeTable& table, const uint8_t* word, size_t len, uint32_t* out) {
  const ByteTokens& bytes = table.bytes();
  uint32_t ids[kPlaces];
  alignas(64) int32_t first[kPlaces];
  // The short word's loops always run to the end: a branch that is not foreseen costs as much as eight of their steps.
  const size_t last = kPlaces == 16 ? 14 : len;
  for (size_t i = 0; i < last; ++i) ids[i + 1] = bytes.one(word[i]);
  for (size_t i = 0; i < last; ++i) {
    const uint32_t rank = bytes.pair(word[i], word[i + 1]);
    first[i + 1] = rank == kNoToken ? kNoMerge : int32_t(rank << 6 | (i + 1));
  }
  ids[0] = ids[len + 1] = kNoToken;
  const uint64_t all = ~uint64_t(0) >> (62 - len);
  Pairs<kPlaces> pairs(first, all >> 2 & ~uint64_t(1));
  uint64_t starts = all;
  for (int32_t lowest; (lowest = pairs.lowest()) != kNoMerge;) {
    const size_t at = size_t(lowest) & 63;
    const uint32_t id = uint32_t(lowest) >> 6;
    const uint64_t behind = starts & ~uint64_t(1) << at;
    const uint64_t after = behind & (behind - 1);
    const auto gone = size_t(__builtin_ctzll(behind)), next = size_t(__builtin_ctzll(after));
    const auto before = 63 - size_t(__builtin_clzll(starts & ((uint64_t(1) << at) - 1)));
    starts ^= behind ^ after;
    ids[at] = id;
    const int32_t with_next = pair_value(table, id, ids[next], at);
    const int32_t with_before = pair_value(table, ids[before], id, before);
    pairs.set(gone, kNoMerge);
    pairs.set(at, with_next);
    pairs.set(before, with_before);
  }
  starts &= all >> 1 & ~uint64_t(1);
  const auto num_ids = size_t(__builtin_popcountll(starts));
  for (int i = 0; i < 4; ++i, starts &= starts - 1) out[i] = ids[starts == 0 ? 0 : __builtin_ctzll(starts)];
  for (size_t i = 4; i < num_ids; ++i, starts &= starts - 1) out[i] = ids[__builtin_ctzll(starts)];
  return num_ids;
}

}  // namespace

size_t merge_word(const MergeTable& table, const uint8_t* word, size_t len, uint32_t* out) {
  if (len + 2 <= 16) return merge<16>(table, word, len, out);
  return len + 2 <= 32 ? merge<32>(table, word, len, out) : merge<64>(table, word, len, out);
}

}  // namespace herdkern::text::HK_MERGE_LEVEL
