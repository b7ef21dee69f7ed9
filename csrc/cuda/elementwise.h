// What the launchers of the element-wise kernels share, compiled by every compiler: types as bindings pass them, and
// the choice of the access width.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "cpu/element.h"

namespace herdkern::cuda {

using cpu::Element;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of a grid's first dimension.
inline unsigned grid_size(const char* op, int64_t num_blocks) {
  if (num_blocks > 0x7fffffff)
    throw std::runtime_error(std::string(op) + ": a launch must have at most 2^31 - 1 blocks, got " +
                             std::to_string(num_blocks) + "; split the call");
  return static_cast<unsigned>(num_blocks);
}

// Are all of these addresses, and distances in bytes, multiples of 16?
inline bool is_aligned(std::initializer_list<const void*> addresses, std::initializer_list<int64_t> distances) {
  uintptr_t bits = 0;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  for (const int64_t distance : distances) bits |= static_cast<uintptr_t>(distance);
  return bits % 16 == 0;
}

}  // namespace herdkern::cuda
