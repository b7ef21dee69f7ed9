// The line kernel for the baseline, and the choice of a level.
#define HK_LINE_LEVEL baseline
#include <string_view>

#include "text/line_keys_kernel.h"

namespace herdkern::text {

const std::vector<LineKernels>& line_levels() {
  static const std::vector<LineKernels> levels = [] {
    std::vector<LineKernels> found;
    for (const MinHashKernels& minhash : minhash_levels()) {
      const std::string_view level = minhash.level;
#if defined(HK_X86)
      if (level == "avx512") found.push_back(avx512::line_kernels());
      if (level == "avx2") found.push_back(avx2::line_kernels());
#endif
      if (level == "baseline") found.push_back(baseline::line_kernels());
    }
    return found;
  }();
  return levels;
}

}  // namespace herdkern::text
