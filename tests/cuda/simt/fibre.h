// A second stack to run on, and the switch from one to another.
#pragma once
#include <cstddef>
#include <cstdint>

namespace simt {

#if defined(__x86_64__)
// Saves what a called function has to keep, stores the stack pointer in *from, goes on at `to`. In launch.cpp.
extern "C" void simt_switch(void** from, void* to);

// What to switch to in order to call `entry`, which never returns, on the stack that ends at `top`.
inline void* fibre_on(unsigned char* top, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  *--sp = nullptr;  // where `entry` would return to; also makes its frame aligned as after a call
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  return sp;
}
#else
#error "the emulator switches stacks by hand and knows x86-64 alone"
#endif

}  // namespace simt
