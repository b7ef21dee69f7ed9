// The block scanners for any processor, and the choice among the levels.
#define HK_BLOCK_LEVEL baseline
#include <algorithm>
#include <string_view>
#include <vector>

#include "text/code_point_set.h"
#include "text/isa_level.h"
#include "text/splitter_blocks_kernel.h"
#include "text/unicode_sets.h"

namespace herdkern::text {

const uint8_t* char_kinds() {
  static const std::vector<uint8_t> kinds = [] {
    std::vector<uint8_t> result;
    result.reserve(kNumCodePoints);
    for (const uint16_t run : kCategoryRuns) {
      const std::string_view category = kCategoryNames[run & 31];
      uint8_t kind = 0;
      if (category == "Lu" || category == "Lt") kind = kUpperBit;
      if (category == "Ll") kind = kLowerBit;
      if (category == "Lm" || category == "Lo") kind = kOtherLetterBit;
      if (category[0] == 'M') kind = kMarkBit;
      if (category[0] == 'N') kind = kNumberBit;
      if (category[0] == 'P' || category[0] == 'S') kind = kSymbolBit;
      result.insert(result.end(), run >> 5, kind);
    }
    const CodePointSet spaces = white_space();
    for (const auto& range : spaces.ranges()) {
      std::fill(result.begin() + range.first, result.begin() + range.last + 1, uint8_t(kSpaceBit));
    }
    for (const auto& [first, last] : {CodePointSet::Range{0x4E00, 0x9FA5}, {0x3040, 0x30FF}}) {
      for (uint32_t c = first; c <= last; ++c) result[c] |= kCjkBit;
    }
    return result;
  }();
  return kinds.data();
}

BlockScan find_block_scan(BlockPattern pattern) {
#if defined(HK_X86)
  const IsaLevel level = isa_level();
  if (level >= IsaLevel::kVbmi2) return vbmi2::block_scan(pattern);
  if (level >= IsaLevel::kAvx512) return avx512::block_scan(pattern);
  if (level >= IsaLevel::kAvx2) return avx2::block_scan(pattern);
#endif
  return baseline::block_scan(pattern);
}

}  // namespace herdkern::text
