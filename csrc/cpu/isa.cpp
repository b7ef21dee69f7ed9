#include "cpu/isa.h"

#include <pthread.h>

#include <cstring>
#include <stdexcept>
#include <string>

#ifdef HK_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace herdkern::cpu {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "amx"};
constexpr int kNumLevels = 4;

struct Features {
  Isa level = Isa::kBaseline;
  bool avx512_bf16 = false;
};

#ifdef HK_X86
constexpr bool bit(unsigned value, int index) { return (value >> index) & 1u; }

// What x86-64-v3 adds to the baseline, as far as a compiler may use it.
bool has_v3(unsigned ecx1, unsigned ebx7) {
  unsigned a = 0, b = 0, ecx_ext = 0, d = 0;
  __get_cpuid(0x80000001, &a, &b, &ecx_ext, &d);
  const bool leaf1 = bit(ecx1, 12) && bit(ecx1, 22) && bit(ecx1, 28) && bit(ecx1, 29);  // FMA MOVBE AVX F16C
  return leaf1 && bit(ebx7, 5) && bit(ebx7, 3) && bit(ebx7, 8) && bit(ecx_ext, 5);      // AVX2 BMI1 BMI2 LZCNT
}

// AVX512 F, DQ, CD, BW, VL: x86-64-v4.
bool has_v4(unsigned ebx7) { return bit(ebx7, 16) && bit(ebx7, 17) && bit(ebx7, 28) && bit(ebx7, 30) && bit(ebx7, 31); }

// Linux hands out the 8 KiB of tile state only to a process that asks for it.
bool request_tile_state() {
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

Features probe() {
  Features found;
  const unsigned max_leaf = __get_cpuid_max(0, nullptr);
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (max_leaf < 7) return found;
  __get_cpuid(1, &a, &b, &c, &d);
  const unsigned ecx1 = c;
  if (!bit(ecx1, 27)) return found;  // OSXSAVE: XGETBV may be used
  unsigned xcr0_low, xcr0_high;
  __asm__ volatile("xgetbv" : "=a"(xcr0_low), "=d"(xcr0_high) : "c"(0));
  const bool saves_ymm = (xcr0_low & 0x6) == 0x6, saves_zmm = (xcr0_low & 0xe6) == 0xe6;
  const bool saves_tiles = (xcr0_low & 0x60000) == 0x60000;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  const unsigned max_subleaf = a, ebx7 = b, edx7 = d;
  if (!saves_ymm || !has_v3(ecx1, ebx7)) return found;
  found.level = Isa::kAvx2;
  if (!saves_zmm || !has_v4(ebx7)) return found;
  found.level = Isa::kAvx512;
  if (max_subleaf < 1) return found;
  __get_cpuid_count(7, 1, &a, &b, &c, &d);
  found.avx512_bf16 = bit(a, 5);
  const bool tiles = bit(edx7, 22) && bit(edx7, 24);  // AMX-BF16, AMX-TILE
  if (found.avx512_bf16 && tiles && saves_tiles && request_tile_state()) found.level = Isa::kAmx;
  return found;
}
#else
Features probe() { return {}; }
#endif

const Features& features() {
  static const Features found = probe();
  return found;
}

Isa& active() {
  static Isa isa = features().level;
  return isa;
}

bool forked = false;

// Registered when the module is loaded: a child made by fork has lost the threads of its parent's OpenMP pool.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa detected_isa() { return features().level; }

Isa active_isa() { return active(); }

bool has_avx512_bf16() { return features().avx512_bf16; }

bool in_forked_child() { return forked; }

void set_active_isa(const char* name) {
  if (name == nullptr || *name == '\0') {
    active() = features().level;
    return;
  }
  for (int level = 0; level < kNumLevels; ++level) {
    if (std::strcmp(name, kNames[level]) != 0) continue;
    if (level > static_cast<int>(features().level)) {
      throw std::runtime_error(std::string("HERDKERN_ISA must be a level that this machine runs, got '") + name +
                               "'; its highest is '" + isa_name(features().level) + "'");
    }
    active() = static_cast<Isa>(level);
    return;
  }
  throw std::invalid_argument(std::string("HERDKERN_ISA must be baseline, avx2, avx512 or amx, got '") + name +
                              "'; unset it to use the highest level of this machine");
}

}  // namespace herdkern::cpu
