// Rotary position embedding on the CPU: pair i of each head is turned by the angle positions[t] * frequency[i].
//   half-split:  pair i is (x[i], x[i + head_dim / 2]), the layout of Hugging Face weights
//   interleaved: pair i is (x[2 i], x[2 i + 1]), the layout of the paper and of Meta's weights
// The backward pass is the same turn the other way. Torch-free: herdkern/ops/rope.py checks shapes and positions.
// Source: Su et al. 2021, eq. 34 (arXiv:2104.09864).
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace herdkern::cpu {

struct Rope {
  int64_t num_tokens, num_heads, head_dim;
  int64_t token_stride, head_stride;  // of x, in elements; out is contiguous
  bool is_bf16, interleaved, inverse, wide_positions;
  int num_threads;
  const void* x;                       // (num_tokens, num_heads, head_dim), last dimension contiguous
  const float *cos_table, *sin_table;  // (max_position, head_dim / 2)
  const void* positions;               // (num_tokens,) int64 if wide_positions, else int32; all below max_position
  void* out;
};

}  // namespace herdkern::cpu

HK_DECLARE_PER_LEVEL(void rope(const Rope& args);)
