// The block scanners for any processor, and the choice among the levels.
#define HK_BLOCK_LEVEL baseline
#include <cstdlib>
#include <string_view>
#include <vector>

#include "text/splitter_blocks_kernel.h"
#include "text/unicode_classes.h"

namespace herdkern::text {

const uint8_t* char_kinds() {
  static const std::vector<uint8_t> kinds = [] {
    // by class of kClassRuns: other, letter, upper, lower, mark, number, space, newline (which is ASCII)
    constexpr uint8_t kOfClass[8] = {0, kOtherLetterBit, kUpperBit, kLowerBit, kMarkBit, kNumberBit, kSpaceBit, 0};
    std::vector<uint8_t> result;
    result.reserve(0x110000);
    for (const uint16_t run : kClassRuns) result.insert(result.end(), run >> 3, kOfClass[run & 7]);
    return result;
  }();
  return kinds.data();
}

BlockScan find_block_scan(BlockPattern pattern) {
#if defined(HK_X86)
  const char* forced = std::getenv("HERDKERN_ISA");
  const std::string_view most = forced != nullptr && *forced != '\0' ? forced : "amx";
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl");
  if (has_avx512 && most != "avx2" && most != "baseline") return avx512::block_scan(pattern);
  if (has_avx2 && most != "baseline") return avx2::block_scan(pattern);
#endif
  return baseline::block_scan(pattern);
}

}  // namespace herdkern::text
