// The instructions that the text kernels may use. Kernels built for a level lie in a namespace of its name.
#pragma once

namespace herdkern::text {

// In ascending order: a processor that runs one level runs all below it.
enum class IsaLevel { kBaseline, kAvx2, kAvx512, kVbmi2 };

// The highest level of this processor, at most that of HERDKERN_ISA, which is read at every call; "amx" has nothing to
// add here and "avx512" excludes VBMI2. Throws std::runtime_error if it names no level.
IsaLevel isa_level();

}  // namespace herdkern::text
