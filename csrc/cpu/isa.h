// Instruction set levels: which this machine runs, which is in use, and how a call reaches the code built for it.
// Every kernel source is compiled once per level with HK_ISA set to the level's name (setup.py); its functions live in
// namespace herdkern::cpu::HK_ISA. A header declares them for all levels with HK_DECLARE_PER_LEVEL, a binding calls
// the right one with HK_DISPATCH.
#pragma once

namespace herdkern::cpu {

// In ascending order: a machine that runs one level runs all below it.
enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// The level's name as in HERDKERN_ISA: baseline, avx2, avx512, amx.
const char* isa_name(Isa isa);

// The highest level that the processor and the kernel offer (cpuid, XCR0 and, for AMX, the permission call), probed
// once.
Isa detected_isa();

// The level in use: the detected one unless set_active_isa chose a lower one.
Isa active_isa();

// Uses the named level from now on; nullptr or "" returns to the detected one. Throws std::invalid_argument on an
// unknown name and std::runtime_error on a level that this machine lacks. Not for use while a kernel runs.
void set_active_isa(const char* name);

// Does the processor have AVX512_BF16 (vdpbf16ps), which level avx512 does not imply?
bool has_avx512_bf16();

// Is this process a forked child of the one that loaded the module? OpenMP hangs there, so kernels run serially.
bool in_forked_child();

}  // namespace herdkern::cpu

#ifdef HK_X86
#define HK_DECLARE_PER_LEVEL(...) \
  namespace herdkern::cpu {       \
  namespace baseline {            \
  __VA_ARGS__                     \
  }                               \
  namespace avx2 {                \
  __VA_ARGS__                     \
  }                               \
  namespace avx512 {              \
  __VA_ARGS__                     \
  }                               \
  namespace amx {                 \
  __VA_ARGS__                     \
  }                               \
  }  // namespace herdkern::cpu

// Calls herdkern::cpu::<active level>::function(arguments); use it inside namespace herdkern::cpu.
#define HK_DISPATCH(function, ...)                                \
  (active_isa() == Isa::kAmx      ? amx::function(__VA_ARGS__)    \
   : active_isa() == Isa::kAvx512 ? avx512::function(__VA_ARGS__) \
   : active_isa() == Isa::kAvx2   ? avx2::function(__VA_ARGS__)   \
                                  : baseline::function(__VA_ARGS__))
#else
#define HK_DECLARE_PER_LEVEL(...) \
  namespace herdkern::cpu {       \
  namespace baseline {            \
  __VA_ARGS__                     \
  }                               \
  }  // namespace herdkern::cpu

#define HK_DISPATCH(function, ...) baseline::function(__VA_ARGS__)
#endif
