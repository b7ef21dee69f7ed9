// The MinHash kernel for the baseline, the tables of its word definition, and the choice of a level.
#define HK_MINHASH_LEVEL baseline
#include <algorithm>
#include <memory>
#include <utility>

#include "text/isa_level.h"
#include "text/minhash_kernel.h"
#include "text/unicode_sets.h"

namespace herdkern::text {

namespace {

struct Range {
  uint32_t first, last;
};

// Scripts that put no spaces between words. Separators inside the ranges (punctuation, symbols) stay separators.
constexpr Range kUnspacedScripts[] = {
    {0x0E00, 0x0EFF},    // Thai, Lao
    {0x1000, 0x109F},    // Myanmar
    {0x1780, 0x17FF},    // Khmer
    {0x1950, 0x19FF},    // Tai Le, New Tai Lue, Khmer symbols
    {0x1A20, 0x1AAF},    // Tai Tham
    {0x2E80, 0x2FDF},    // CJK and Kangxi radicals
    {0x3005, 0x3007},    // ideographic marks and zero
    {0x3021, 0x3029},    // Hangzhou numerals
    {0x3031, 0x30FF},    // Hiragana, Katakana
    {0x31F0, 0x31FF},    // Katakana extensions
    {0x3400, 0x4DBF},    // CJK extension A
    {0x4E00, 0x9FFF},    // CJK
    {0xA9E0, 0xA9FF},    // Myanmar extended B
    {0xAA60, 0xAADF},    // Myanmar extended A, Tai Viet
    {0xF900, 0xFAFF},    // CJK compatibility
    {0xFF66, 0xFF9F},    // half-width Katakana
    {0x1AFF0, 0x1B16F},  // Kana extensions
    {0x20000, 0x3FFFD},  // CJK extensions B and later
};

// Simple case folding of the common two-byte letters: every `step`-th code point of [first, last] moves by `shift`.
constexpr struct {
  uint32_t first, last, step, shift;
} kFolds[] = {
    {0xC0, 0xD6, 1, 32},   {0xD8, 0xDE, 1, 32},  // Latin-1
    {0x100, 0x12E, 2, 1},  {0x132, 0x136, 2, 1},
    {0x139, 0x147, 2, 1},  // Latin Extended-A
    {0x14A, 0x176, 2, 1},  {0x178, 0x178, 1, 0xFFFFFF87u /* -121 */},
    {0x179, 0x17D, 2, 1},  {0x386, 0x386, 1, 38},
    {0x388, 0x38A, 1, 37}, {0x38C, 0x38C, 1, 64},  // Greek
    {0x38E, 0x38F, 1, 63}, {0x391, 0x3A1, 1, 32},
    {0x3A3, 0x3AB, 1, 32}, {0x3C2, 0x3C2, 1, 1},  // final sigma
    {0x400, 0x40F, 1, 80}, {0x410, 0x42F, 1, 32},
    {0x460, 0x480, 2, 1},  // Cyrillic
    {0x48A, 0x4BE, 2, 1},  {0x4C0, 0x4C0, 1, 15},
    {0x4C1, 0x4CD, 2, 1},  {0x4D0, 0x52E, 2, 1},
    {0x531, 0x556, 1, 48},  // and Armenian
};

std::unique_ptr<WordTable> make_word_table() {
  auto table = std::make_unique<WordTable>();
  uint32_t next = 0;
  for (const uint16_t run : kCategoryRuns) {
    const char major = kCategoryNames[run & 31][0];
    const uint8_t word_class = major == 'L' || major == 'M' || major == 'N' ? kWordPart : kSeparator;
    for (uint32_t i = 0; i < static_cast<uint32_t>(run >> 5); ++i) table->word_class[next++] = word_class;
  }
  for (const Range& range : kUnspacedScripts)
    for (uint32_t c = range.first; c <= range.last; ++c)
      if (table->word_class[c] == kWordPart) table->word_class[c] = kUnspaced;
  for (uint16_t& c : table->folded) c = 0;
  for (const auto& fold : kFolds)
    for (uint32_t c = fold.first; c <= fold.last; c += fold.step)
      table->folded[c] = static_cast<uint16_t>(c + fold.shift);
  for (uint32_t c = 0; c < 0x800; ++c) {
    const uint32_t folded = table->folded[c] ? table->folded[c] : c;
    const uint32_t bits = table->word_class[c] == kWordPart ? 3 : 0;
    table->two_bytes[c] = (0xC0 | folded >> 6) | (0x80 | (folded & 0x3F)) << 8 | bits << 16;
  }
  return table;
}

std::vector<MinHashKernels> find_levels() {
  std::vector<MinHashKernels> levels;
#if defined(HK_X86)
  const IsaLevel level = isa_level();
  if (level >= IsaLevel::kAvx512) levels.push_back(avx512::minhash_kernels());
  if (level >= IsaLevel::kAvx2) levels.push_back(avx2::minhash_kernels());
#endif
  levels.push_back(baseline::minhash_kernels());
  return levels;
}

}  // namespace

const WordTable& word_table() {
  static const std::unique_ptr<WordTable> table = make_word_table();
  return *table;
}

void finish_plan(SignPlan& plan) {
  plan.char_power = 1;
  for (int64_t i = 0; i < plan.ngram_size; ++i)
    plan.char_power = reduce61(fold61(static_cast<unsigned __int128>(plan.char_power) * kCharBase));
  if (plan.family != Family::kOph) return;
  const uint64_t num_bins = plan.num_slots;
  plan.bin_order.resize(num_bins * num_bins);
  plan.bin_rank.resize(num_bins * num_bins);
  std::vector<std::pair<uint64_t, uint16_t>> order(num_bins);
  for (uint64_t bin = 0; bin < num_bins; ++bin) {
    for (uint64_t other = 0; other < num_bins; ++other)
      order[other] = {mix(plan.salt + kGolden * (bin * num_bins + other + 1)), static_cast<uint16_t>(other)};
    std::sort(order.begin(), order.end());
    for (uint64_t rank = 0; rank < num_bins; ++rank) {
      plan.bin_order[bin * num_bins + rank] = order[rank].second;
      plan.bin_rank[bin * num_bins + order[rank].second] = static_cast<uint16_t>(rank);
    }
  }
}

const std::vector<MinHashKernels>& minhash_levels() {
  static const std::vector<MinHashKernels> levels = find_levels();
  return levels;
}

}  // namespace herdkern::text
