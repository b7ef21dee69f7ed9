// The body of merge_word, compiled once per x86-64 level (HK_MERGE_LEVEL names it, and its namespace). See
// bpe_word_merge.h. Everything here has internal linkage or lies in the level's namespace.
#pragma once
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <cstring>

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
// there is such a token, which could not be foreseen. asked: all bits set; or none, then the answer means nothing.
inline int32_t pair_value(const MergeTable& table, uint32_t left, uint32_t right, size_t place,
                          uint64_t asked = ~uint64_t(0)) {
  const uint64_t key = MergeTable::key_of(left, right), hash = MergeTable::hash_of(key);
  const uint64_t filter = table.filter(hash) & asked;
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

// A part is known by its place, 1 to `end` - 1; a part that goes with no other lies at 0 and one at `end`, so that
// every part has two neighbours.
//
// Merges the parts whose places are the bits of `starts`. ids: by place; first_pairs: what each makes with the next.
template <size_t kPlaces>
size_t merge(const MergeTable& table, uint32_t* ids, const int32_t* first_pairs, uint64_t starts, size_t end,
             uint32_t* out) {
  ids[0] = ids[end] = kNoToken;
  const uint64_t inside = starts, last = uint64_t(1) << (63 - __builtin_clzll(starts));
  Pairs<kPlaces> pairs(first_pairs, starts ^ last);
  starts |= 1 | uint64_t(1) << end;
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
  starts &= inside;
  const auto num_ids = size_t(__builtin_popcountll(starts));
  for (int i = 0; i < 4; ++i, starts &= starts - 1) out[i] = ids[starts == 0 ? 0 : __builtin_ctzll(starts)];
  for (size_t i = 4; i < num_ids; ++i, starts &= starts - 1) out[i] = ids[__builtin_ctzll(starts)];
  return num_ids;
}

// Bit k: the pair at place k comes before both its neighbours, so that it is merged whatever else is. Those at 0 and
// `end` are none.
template <size_t kPlaces>
uint64_t sure_pairs(const uint64_t* pairs, size_t end) {
  constexpr int kBits = WordStarts::kRankBits;
  constexpr uint64_t kMask = WordStarts::kNoRank;
  uint64_t sure = 0;
#if defined(__AVX512F__)
  const __m512i mask = _mm512_set1_epi64(int64_t(kMask));
  for (size_t i = 0; i < kPlaces; i += 8) {
    const __m512i ranks = _mm512_srli_epi64(_mm512_loadu_si512(pairs + i + 1), 2 * kBits);
    const __m512i before = _mm512_and_si512(_mm512_srli_epi64(_mm512_loadu_si512(pairs + i), kBits), mask);
    const __m512i behind = _mm512_and_si512(_mm512_loadu_si512(pairs + i + 2), mask);
    sure |= uint64_t(_mm512_cmplt_epi64_mask(ranks, _mm512_min_epi64(before, behind))) << i << 1;
  }
#else
  for (size_t k = 1; k < end; ++k) {
    const uint64_t rank = pairs[k] >> 2 * kBits;
    sure |= uint64_t(rank < (pairs[k - 1] >> kBits & kMask) && rank < (pairs[k + 1] & kMask)) << k;
  }
#endif
  return sure & ((uint64_t(1) << end) - 1);
}

// A word of ASCII alone: byte i is at place i + 1.
template <size_t kPlaces>
size_t merge_ascii(const MergeTable& table, const WordStarts& starts, const uint8_t* word, size_t len, uint32_t* out) {
  uint32_t ids[kPlaces];
  uint64_t entries[kPlaces + 9];
  alignas(64) int32_t pairs[kPlaces];
  // The short word's loops always run to the end: a branch that is not foreseen costs as much as eight of their steps.
  const size_t last = kPlaces == 16 ? 14 : len;
  for (size_t i = 0; i < last; ++i) entries[i + 1] = starts.ascii_pair(word[i], word[i + 1]);
  entries[0] = entries[len] = ~uint64_t(0);
  const uint64_t sure = sure_pairs<kPlaces>(entries, len);
  const ByteTokens& bytes = table.bytes();
  for (size_t i = 0; i < last; ++i) {
    const auto rank = uint32_t(entries[i + 1] >> 2 * WordStarts::kRankBits);
    ids[i + 1] = sure >> (i + 1) & 1 ? rank : bytes.one(word[i]);
    pairs[i + 1] = rank == WordStarts::kNoRank ? kNoMerge : int32_t(rank << 6 | (i + 1));
  }
  const uint64_t parts = ((uint64_t(2) << len) - 2) & ~(sure << 1);
  for (uint64_t rest = parts, behind; (behind = rest & (rest - 1)) != 0; rest = behind) {
    const auto at = size_t(__builtin_ctzll(rest)), next = size_t(__builtin_ctzll(behind));
    const uint64_t is_new = 0 - ((sure >> at | sure >> next) & 1);
    const int32_t value = pair_value(table, ids[at], ids[next], at, is_new);
    pairs[at] = is_new ? value : pairs[at];
  }
  return merge<kPlaces>(table, ids, pairs, parts, len + 1, out);
}

// Parts 1 to n: `ids` holds them.
template <size_t kPlaces>
size_t merge_parts(const MergeTable& table, uint32_t* ids, size_t n, uint32_t* out) {
  alignas(64) int32_t pairs[kPlaces];
  for (size_t i = 1; i < n; ++i) pairs[i] = pair_value(table, ids[i], ids[i + 1], i);
  return merge<kPlaces>(table, ids, pairs, (uint64_t(2) << n) - 2, n + 1, out);
}

inline uint32_t load_big_endian(const uint8_t* p) {
  uint32_t value;
  std::memcpy(&value, p, 4);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  value = __builtin_bswap32(value);
#endif
  return value;
}

// Writes what the word may be merged from to ids[1 ..], returns how many; more than kMergedAtOnce: it has not come to
// the end. Room for kMergedAtOnce + 6.
inline size_t lay_starts(const WordStarts& starts, const ByteTokens& one_byte, const uint8_t* word, size_t len,
                         uint32_t* ids) {
  static constexpr uint32_t kTails[4] = {0, 0, 0x00C00000, 0x00C0C000};
  bool behind_space = len > 1 && word[0] == ' ' && word[1] >= 0x80;
  uint32_t* to = ids + 1;
  uint32_t before = WordStarts::kNoByte;
  for (size_t at = 0; at < len && to <= ids + kMergedAtOnce + 1; behind_space = false) {
    const size_t begin = at;
    at += behind_space;
    const uint32_t bytes = load_big_endian(word + at), first = bytes >> 24;
    const uint32_t two = (first & 0x1F) << 6 | (bytes >> 16 & 0x3F);
    const uint32_t three = (bytes >> 12 & 0xF000) | (bytes >> 10 & 0xFC0) | (bytes >> 8 & 0x3F);
    const bool is_three = first >= 0xE0 && first < 0xF0, is_two = first >= 0xC2 && first < 0xE0;
    const size_t size = is_three ? 3 : is_two ? 2 : 1;
    const uint32_t place = is_three ? three : is_two ? two : WordStarts::place_of_byte(first);
    const bool is_odd = (bytes & kTails[size]) != (kTails[size] & 0x00808000) || at + size > len ||
                        (is_three && ((three & 0xF800) == 0 || (three & 0xF800) == 0xD800));
    const WordStarts::Start& start = behind_space ? starts.start_behind_space(place) : starts.start(place);
    at += size;
    const uint32_t behind = at < len ? bytes << 8 * size >> 24 : WordStarts::kNoByte;
    const uint32_t num_ids = start.notes & WordStarts::kNumIds;
    if (__builtin_expect(is_odd || num_ids == 0 || (start.notes & (starts.before(before) | starts.behind(behind))),
                         0)) {
      if (is_odd) at -= size - 1;
      for (size_t i = begin; i < at; ++i) *to++ = one_byte.one(word[i]);
    } else {
      std::memcpy(to, start.ids, sizeof start.ids);
      to += num_ids;
    }
    before = word[at - 1];
  }
  return size_t(to - ids) - 1;
}

// Whether a byte is none of ASCII, of the first 64.
inline bool has_other_bytes(const uint8_t* word, size_t len) {
#if defined(__AVX512BW__)
  const uint64_t high = uint64_t(_mm512_movepi8_mask(_mm512_loadu_si512(word)));
#elif defined(__AVX2__)
  const auto half = [word](size_t i) {
    return uint64_t(uint32_t(_mm256_movemask_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(word + i)))));
  };
  const uint64_t high = half(0) | half(32) << 32;
#else
  uint64_t high = 0;
  for (size_t i = 0; i < len && i < 64; ++i) high |= uint64_t(word[i] >> 7) << i;
#endif
  return (len < 64 ? high << (64 - len) : high) != 0;
}

}  // namespace

size_t merge_word(const MergeTable& table, const WordStarts& starts, const uint8_t* word, size_t len, uint32_t* out) {
  if (has_other_bytes(word, len)) {
    uint32_t ids[64 + 8];
    const size_t n = lay_starts(starts, table.bytes(), word, len, ids);
    if (n > kMergedAtOnce) return 0;
    if (n + 2 <= 16) return merge_parts<16>(table, ids, n, out);
    return n + 2 <= 32 ? merge_parts<32>(table, ids, n, out) : merge_parts<64>(table, ids, n, out);
  }
  if (len > kMergedAtOnce) return 0;
  if (len + 2 <= 16) return merge_ascii<16>(table, starts, word, len, out);
  return len + 2 <= 32 ? merge_ascii<32>(table, starts, word, len, out)
                       : merge_ascii<64>(table, starts, word, len, out);
}

}  // namespace herdkern::text::HK_MERGE_LEVEL
