// The MinHash kernel's body, compiled once per x86-64 level (HK_MINHASH_LEVEL names it, and its namespace).
// Words are hashed as they are found, combined to shingles 2,048 at a time and run through all slots while in the
// cache.
#pragma once
#include "text/minhash_words.h"

namespace herdkern::text::HK_MINHASH_LEVEL {

#if defined(__AVX512BW__)
constexpr int kVectorBytes = 64, kVectorsAtOnce = 8;  // 8 x (minimum, multiplier, offset) = 24 of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kVectorsAtOnce = 4;  // 12 of 16
#else
constexpr int kVectorBytes = 16, kVectorsAtOnce = 4;
#endif
constexpr int kLanes = kVectorBytes / 4;
typedef uint32_t Lanes __attribute__((vector_size(kVectorBytes)));

// minima: (kVectors * kLanes,) at slot `first`, lowered to those of the num_shingles values at x.
template <int kVectors>
inline void lower_minima(const uint32_t* x, int64_t num_shingles, const uint32_t* a, const uint32_t* b,
                         uint32_t* minima) {
  Lanes low[kVectors], factor[kVectors], offset[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    std::memcpy(&low[v], minima + v * kLanes, kVectorBytes);
    std::memcpy(&factor[v], a + v * kLanes, kVectorBytes);
    std::memcpy(&offset[v], b + v * kLanes, kVectorBytes);
  }
  for (int64_t i = 0; i < num_shingles; ++i) {
    const uint32_t value = x[i];
    for (int v = 0; v < kVectors; ++v) {
      const Lanes slot = factor[v] * value + offset[v];
      low[v] = slot < low[v] ? slot : low[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) std::memcpy(minima + v * kLanes, &low[v], kVectorBytes);
}

inline void lower_all_minima(const std::vector<uint32_t>& x, const SignPlan& plan, std::vector<uint32_t>& minima) {
  const int64_t num_slots = plan.multipliers.size(), num_shingles = x.size();
  for (int64_t slot = 0; slot < num_slots;) {
    const uint32_t *a = plan.multipliers.data() + slot, *b = plan.offsets.data() + slot;
    uint32_t* low = minima.data() + slot;
    const int64_t vectors = std::min<int64_t>((num_slots - slot) / kLanes, kVectorsAtOnce);
    slot += vectors * kLanes;
    switch (vectors) {
      case 8:
        lower_minima<8>(x.data(), num_shingles, a, b, low);
        break;
      case 7:
        lower_minima<7>(x.data(), num_shingles, a, b, low);
        break;
      case 6:
        lower_minima<6>(x.data(), num_shingles, a, b, low);
        break;
      case 5:
        lower_minima<5>(x.data(), num_shingles, a, b, low);
        break;
      case 4:
        lower_minima<4>(x.data(), num_shingles, a, b, low);
        break;
      case 3:
        lower_minima<3>(x.data(), num_shingles, a, b, low);
        break;
      case 2:
        lower_minima<2>(x.data(), num_shingles, a, b, low);
        break;
      default:
        lower_minima<1>(x.data(), num_shingles, a, b, low);
        break;
    }
  }
}

constexpr size_t kBatchWords = 2048;

// Calls take(hash) for every shingle of a window of words.
template <typename Take>
inline void combine_words(const uint64_t* words, int64_t num_words, const SignPlan& plan, Take&& take) {
  const int64_t n = plan.ngram_size;
  const uint64_t* factors = plan.word_factors.data();
  if (n == 5) {  // the usual size, unrolled
    const uint64_t c0 = factors[0], c1 = factors[1], c2 = factors[2], c3 = factors[3], c4 = factors[4];
    for (int64_t i = 0; i + 5 <= num_words; ++i)
      take(mix(c0 * words[i] + c1 * words[i + 1] + c2 * words[i + 2] + c3 * words[i + 3] + c4 * words[i + 4]));
    return;
  }
  for (int64_t i = 0; i + n <= num_words; ++i) {
    uint64_t sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += factors[j] * words[i + j];
    take(mix(sum));
  }
}

// Calls window(words, count) for pieces of the text's words that overlap by ngram_size - 1, so that every shingle is in
// exactly one. A text of fewer words than ngram_size gives `single` its only shingle.
template <typename Window, typename Single>
inline void scan_windows(const uint8_t* text, int64_t size, const SignPlan& plan, Scratch& scratch, Window&& window,
                         Single&& single) {
  const size_t overlap = plan.ngram_size - 1, capacity = kBatchWords + overlap;
  scratch.words.resize(capacity);
  uint64_t* words = scratch.words.data();
  size_t count = 0;
  bool flushed = false;
  scan_words<false>(text, size, scratch, word_table(), [&](const uint8_t* word, int64_t bytes) {
    if (count == capacity) {
      window(words, static_cast<int64_t>(count));
      flushed = true;
      std::copy(words + count - overlap, words + count, words);
      count = overlap;
    }
    words[count++] = hash_bytes(word, bytes);
  });
  if (count > overlap) return window(words, static_cast<int64_t>(count));
  if (flushed || count == 0) return;
  uint64_t sum = kGolden * count;
  for (size_t j = 0; j < count; ++j) sum += plan.word_factors[j] * words[j];
  single(mix(sum));
}

void sign(const uint8_t* text, int64_t size, const SignPlan& plan, Scratch& scratch, uint32_t* out) {
  auto& minima = scratch.minima;
  auto& reduced = scratch.reduced;
  minima.assign(plan.multipliers.size(), 0xFFFFFFFFu);
  const auto window = [&](const uint64_t* words, int64_t count) {
    reduced.resize(count - plan.ngram_size + 1);
    uint32_t* next = reduced.data();
    combine_words(words, count, plan, [&](uint64_t hash) { *next++ = static_cast<uint32_t>(hash >> 32); });
    lower_all_minima(reduced, plan, minima);
  };
  const auto single = [&](uint64_t hash) {
    reduced.assign(1, static_cast<uint32_t>(hash >> 32));
    lower_all_minima(reduced, plan, minima);
  };
  scan_windows(text, size, plan, scratch, window, single);
  std::copy(minima.begin(), minima.begin() + plan.num_slots, out);
}

void shingle(const uint8_t* text, int64_t size, const SignPlan& plan, Scratch& scratch, std::vector<uint64_t>& out) {
  const auto take = [&](uint64_t hash) { out.push_back(hash); };
  const auto window = [&](const uint64_t* words, int64_t count) { combine_words(words, count, plan, take); };
  scan_windows(text, size, plan, scratch, window, take);
}

#define HK_STRING_OF(x) #x
#define HK_STRING(x) HK_STRING_OF(x)
MinHashKernels minhash_kernels() { return {HK_STRING(HK_MINHASH_LEVEL), sign, shingle}; }

}  // namespace herdkern::text::HK_MINHASH_LEVEL
