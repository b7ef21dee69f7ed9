// Levels of instructions: see isa_level.h.
#include "text/isa_level.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace herdkern::text {

namespace {

IsaLevel detected_level() {
#if defined(HK_X86)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("bmi") || !__builtin_cpu_supports("bmi2") ||
      !__builtin_cpu_supports("fma"))
    return IsaLevel::kBaseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512cd") || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return IsaLevel::kAvx2;
  return __builtin_cpu_supports("avx512vbmi2") ? IsaLevel::kVbmi2 : IsaLevel::kAvx512;
#else
  return IsaLevel::kBaseline;
#endif
}

IsaLevel allowed_level() {
  const char* forced = std::getenv("HERDKERN_ISA");
  const std::string most = forced != nullptr && *forced != '\0' ? forced : "amx";
  if (most == "amx") return IsaLevel::kVbmi2;
  if (most == "avx512") return IsaLevel::kAvx512;
  if (most == "avx2") return IsaLevel::kAvx2;
  if (most == "baseline") return IsaLevel::kBaseline;
  throw std::runtime_error("HERDKERN_ISA must be baseline, avx2, avx512 or amx, got '" + most +
                           "'; unset it to use the highest level of this machine");
}

}  // namespace

IsaLevel isa_level() { return std::min(detected_level(), allowed_level()); }

}  // namespace herdkern::text
