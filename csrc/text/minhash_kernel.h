// The MinHash kernel's body, compiled once per x86-64 level (HK_MINHASH_LEVEL names it, and its namespace).
// A piece of 8 kB of text is cut into words, the words are hashed, combined to shingles and run through all slots while
// all of it is in the cache.
#pragma once
#include "text/minhash_chars.h"
#include "text/minhash_slots.h"
#include "text/minhash_split.h"
#include "text/minhash_utf8.h"
#include "text/sha1_lanes.h"

namespace herdkern::text::HK_MINHASH_LEVEL {

// The lowest `size` bytes of x, size >= 0; all of it from 8 bytes on (what comes of more than 31 is not used).
inline uint64_t low_bytes(uint64_t x, uint32_t size) {
#if defined(__BMI2__)
  return _bzhi_u64(x, 8 * size);
#else
  return size >= 8 ? x : x & ((uint64_t{1} << (8 * size)) - 1);
#endif
}

// hash_bytes of `count` words; false, and nothing else, if one is longer than kMaxWordBytes. Words of up to 16 bytes
// take no branch; the others are done again.
inline bool hash_words(const uint8_t* folded, const uint32_t* borders, int64_t count, Scratch& scratch,
                       uint64_t* words) {
  if (static_cast<int64_t>(scratch.places.size()) < count) scratch.places.resize(kMaxBorders);
  uint32_t* longer = scratch.places.data();
  int64_t num_longer = 0;
  uint32_t any = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t size = borders[2 * i + 1] - borders[2 * i];
    const uint8_t* p = folded + borders[2 * i];
    const uint64_t salt = kGolden * size, x = low_bytes(load8(p), size);
    const uint64_t y = low_bytes(load8(p + 8), size > 8 ? size - 8 : 0);
    words[i] = multiply_fold(x ^ salt ^ 0xA0761D6478BD642Fu, y ^ salt ^ 0x8EBC6AF09C88C6E3u);
    longer[num_longer] = static_cast<uint32_t>(i);
    num_longer += size > 16;
    any |= size;
  }
  if (any > kMaxWordBytes) {
    for (int64_t i = 0; i < count; ++i)
      if (borders[2 * i + 1] - borders[2 * i] > kMaxWordBytes) return false;
  }
  for (int64_t i = 0; i < num_longer; ++i) {
    const uint32_t* border = borders + 2 * longer[i];
    words[longer[i]] = hash_bytes(folded + border[0], border[1] - border[0]);
  }
  return true;
}

// The borders with words cut after every kMaxWordBytes.
inline const std::vector<uint32_t>& cut_long_words(const uint32_t* borders, int64_t count, Scratch& scratch) {
  auto& cut = scratch.cut;
  cut.clear();
  for (int64_t i = 0; i < count; ++i) {
    uint32_t begin = borders[2 * i];
    for (; borders[2 * i + 1] - begin > kMaxWordBytes; begin += kMaxWordBytes) {
      cut.push_back(begin);
      cut.push_back(begin + kMaxWordBytes);
    }
    cut.push_back(begin);
    cut.push_back(borders[2 * i + 1]);
  }
  return cut;
}

// out: (num_words - ngram_size + 1,), the hashes of the shingles of a window of words.
inline void combine_words(const uint64_t* words, int64_t num_words, const SignPlan& plan, uint64_t* out) {
  const int64_t n = plan.ngram_size;
  const uint64_t* factors = plan.word_factors.data();
  if (n == 5) {  // the usual size, unrolled
    const uint64_t c0 = factors[0], c1 = factors[1], c2 = factors[2], c3 = factors[3], c4 = factors[4];
    for (int64_t i = 0; i + 5 <= num_words; ++i)
      out[i] = mix(c0 * words[i] + c1 * words[i + 1] + c2 * words[i + 2] + c3 * words[i + 3] + c4 * words[i + 4]);
    return;
  }
  for (int64_t i = 0; i + n <= num_words; ++i) {
    uint64_t sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += factors[j] * words[i + j];
    out[i] = mix(sum);
  }
}

template <typename T>
inline T* room_for(std::vector<T>& list, int64_t size) {
  if (static_cast<int64_t>(list.size()) < size) list.resize(size);
  return list.data();
}

// Calls take(hashes, count) for the shingles of the text in order, piece by piece.
template <typename Take>
inline void scan_word_hashes(const uint8_t* text, int64_t size, const SignPlan& plan, Scratch& scratch, Take&& take) {
  const int64_t overlap = plan.ngram_size - 1, capacity = overlap + kMaxBorders / 2 + 64;
  uint64_t* words = room_for(scratch.words, capacity);
  uint64_t* hashes = room_for(scratch.hashes, capacity);
  int64_t count = 0;
  bool any = false;
  Splitter<false> splitter(text, size, scratch, word_table());
  while (splitter.next()) {
    int64_t num_words = splitter.num_words();
    if (!hash_words(splitter.folded(), splitter.borders(), num_words, scratch, words + count)) {
      const auto& cut = cut_long_words(splitter.borders(), num_words, scratch);
      num_words = cut.size() / 2;
      hash_words(splitter.folded(), cut.data(), num_words, scratch, words + count);
    }
    count += num_words;
    if (count <= overlap) continue;
    combine_words(words, count, plan, hashes);
    take(hashes, count - overlap);
    any = true;
    std::copy(words + count - overlap, words + count, words);
    count = overlap;
  }
  if (any || count == 0) return;
  uint64_t sum = kGolden * count;
  for (int64_t j = 0; j < count; ++j) sum += plan.word_factors[j] * words[j];
  hashes[0] = mix(sum);
  take(hashes, 1);
}

// The normalised text of a document, piece by piece, as words or code points with their places in scratch.joined.
class JoinedText {
 public:
  JoinedText(Scratch& scratch) : s_(scratch) {
    s_.joined.clear();
    s_.places.clear();
    s_.code_points.clear();
  }

  // Appends words with a space before each but the first of the text, and the begin and end of each to s.places.
  void add_words(const uint8_t* folded, const uint32_t* borders, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (started_) s_.joined.push_back(' ');
      started_ = true;
      s_.places.push_back(static_cast<uint32_t>(s_.joined.size()));
      s_.joined.insert(s_.joined.end(), folded + borders[2 * i], folded + borders[2 * i + 1]);
      s_.places.push_back(static_cast<uint32_t>(s_.joined.size()));
    }
  }

  // Appends runs, and their code points to s.code_points and s.places. The first goes on with the last run if it says.
  void add_runs(const uint8_t* folded, const uint32_t* borders, int64_t count, bool continues) {
    const int64_t begin = s_.joined.size();
    for (int64_t i = 0; i < count; ++i) {
      if (borders[2 * i] == borders[2 * i + 1]) continue;  // nothing came behind the end of the piece before
      if (started_ && !(continues && i == 0)) s_.joined.push_back(' ');
      started_ = true;
      s_.joined.insert(s_.joined.end(), folded + borders[2 * i], folded + borders[2 * i + 1]);
    }
    append_code_points(s_.joined.data(), begin, s_.joined.size(), s_.code_points, s_.places);
  }

  // Drops what lies before word or code point `first`, of which s.places has `width` numbers each.
  void keep_from(int64_t first, int width) {
    auto& places = s_.places;
    const int64_t at = first * width;
    const uint32_t begin = at < static_cast<int64_t>(places.size()) ? places[at] : s_.joined.size();
    s_.joined.erase(s_.joined.begin(), s_.joined.begin() + begin);
    places.erase(places.begin(), places.begin() + at);
    for (uint32_t& place : places) place -= begin;
    if (width == 1) s_.code_points.erase(s_.code_points.begin(), s_.code_points.begin() + first);
  }

 private:
  Scratch& s_;
  bool started_ = false;
};

// As scan_word_hashes, with the shingles' SHA-1 in place of their hashes.
template <typename Take>
inline void scan_word_sha1(const uint8_t* text, int64_t size, const SignPlan& plan, Scratch& scratch, Take&& take) {
  const int64_t n = plan.ngram_size;
  JoinedText joined(scratch);
  bool any = false;
  const auto take_windows = [&](int64_t windows, int64_t words) {
    uint64_t* hashes = room_for(scratch.hashes, windows);
    const auto& places = scratch.places;
    sha1_first_words(
        scratch.joined.data(),
        [&](int64_t i) { return std::pair<int64_t, int64_t>(places[2 * i], places[2 * (i + words) - 1]); }, windows,
        hashes);
    take(hashes, windows);
  };
  Splitter<false> splitter(text, size, scratch, word_table());
  while (splitter.next()) {
    const auto& cut = cut_long_words(splitter.borders(), splitter.num_words(), scratch);
    joined.add_words(splitter.folded(), cut.data(), cut.size() / 2);
    const int64_t count = scratch.places.size() / 2;
    if (count < n) continue;
    take_windows(count - n + 1, n);
    any = true;
    joined.keep_from(count - n + 1, 2);
  }
  const int64_t count = scratch.places.size() / 2;
  if (!any && count) take_windows(1, count);
}

// The same for n-grams of code points, with either hash.
template <bool kSha1, typename Take>
inline void scan_chars(const uint8_t* text, int64_t size, const SignPlan& plan, Scratch& scratch, Take&& take) {
  const int64_t n = plan.ngram_size;
  const uint64_t power = plan.char_power;
  JoinedText joined(scratch);
  bool any = false;
  const auto take_windows = [&](int64_t windows, int64_t chars) {  // of `chars` code points each
    uint64_t* hashes = room_for(scratch.hashes, windows);
    const auto& places = scratch.places;
    if (kSha1) {
      const auto place = [&](int64_t i) {
        const size_t end = i + chars;
        return std::pair<int64_t, int64_t>(places[i], end < places.size() ? places[end] : scratch.joined.size());
      };
      sha1_first_words(scratch.joined.data(), place, windows, hashes);
    } else if (chars == n) {
      hash_char_windows(scratch.code_points.data(), chars + windows - 1, n, power, hashes);
    } else {
      hashes[0] = mix(hash_chars(scratch.code_points.data(), chars, 1));
    }
    take(hashes, windows);
  };
  Splitter<true> splitter(text, size, scratch, word_table());
  while (splitter.next()) {
    joined.add_runs(splitter.folded(), splitter.borders(), splitter.num_words(), splitter.continues());
    const int64_t count = scratch.code_points.size();
    if (count < n) continue;
    take_windows(count - n + 1, n);
    any = true;
    joined.keep_from(count - n + 1, 1);
  }
  const int64_t count = scratch.code_points.size();
  if (!any && count) take_windows(1, count);
}

template <typename Take>
inline void scan_shingles(const uint8_t* text, int64_t size, const SignPlan& plan, Scratch& scratch, bool sha1,
                          Take&& take) {
  if (plan.unit == Unit::kChar) {
    sha1 ? scan_chars<true>(text, size, plan, scratch, take) : scan_chars<false>(text, size, plan, scratch, take);
  } else {
    sha1 ? scan_word_sha1(text, size, plan, scratch, take) : scan_word_hashes(text, size, plan, scratch, take);
  }
}

// The slots' number rounded up to whole vectors of the widest level.
inline int64_t padded_slots(int64_t num_slots) { return (num_slots + 15) / 16 * 16; }

void sign(const uint8_t* text, int64_t size, const SignPlan& plan, Scratch& scratch, uint32_t* out) {
  auto& minima = scratch.minima;
  minima.assign(padded_slots(plan.num_slots), kNoShingle);
  scan_shingles(text, size, plan, scratch, plan.family == Family::kM61, [&](const uint64_t* hashes, int64_t count) {
    lower_slots(hashes, count, plan, scratch, minima.data());
  });
  if (plan.family == Family::kOph) fill_empty_bins(plan, scratch, minima.data());
  std::copy(minima.begin(), minima.begin() + plan.num_slots, out);
}

void shingle(const uint8_t* text, int64_t size, const SignPlan& plan, Scratch& scratch, std::vector<uint64_t>& out) {
  scan_shingles(text, size, plan, scratch, false,
                [&](const uint64_t* hashes, int64_t count) { out.insert(out.end(), hashes, hashes + count); });
}

void lower(const uint64_t* hashes, int64_t count, const SignPlan& plan, Scratch& scratch, uint32_t* out) {
  auto& minima = scratch.minima;
  minima.assign(padded_slots(plan.num_slots), kNoShingle);
  std::copy(out, out + plan.num_slots, minima.begin());
  lower_slots(hashes, count, plan, scratch, minima.data());
  if (plan.family == Family::kOph) fill_empty_bins(plan, scratch, minima.data());
  std::copy(minima.begin(), minima.begin() + plan.num_slots, out);
}

#define HK_STRING_OF(x) #x
#define HK_STRING(x) HK_STRING_OF(x)
MinHashKernels minhash_kernels() {
  return {HK_STRING(HK_MINHASH_LEVEL), sign, shingle, lower, is_utf8, count_code_points};
}

}  // namespace herdkern::text::HK_MINHASH_LEVEL
