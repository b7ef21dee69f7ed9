// Pages of 2 MiB for large results.
#pragma once
#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

#ifndef HK_ISA
#error "huge_pages.h belongs in a kernel source, which setup.py compiles once per level"
#endif

namespace herdkern::cpu::HK_ISA {

// Asks for huge pages behind memory that is about to be written for the first time. A result of 32 MiB and more is
// fresh from the kernel on every call (the largest threshold of glibc's malloc), and its page faults cost as much as a
// fifth of the attention on short documents. Smaller ones are reused by malloc. Only a hint: nothing else changes.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = uintptr_t{32} << 20, kHuge = uintptr_t{2} << 20;
  if (static_cast<uintptr_t>(bytes) < kLarge) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data), begin = (address + kHuge - 1) / kHuge * kHuge,
                  end = (address + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace herdkern::cpu::HK_ISA
