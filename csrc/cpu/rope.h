// Rotary position embedding on the CPU: pair i of each head is turned by the angle position[t] * frequency[i].
//   half-split:  pair i is (x[i], x[i + head_dim / 2]), the layout of Hugging Face weights
//   interleaved: pair i is (x[2 i], x[2 i + 1]), the layout of the paper and of Meta's weights
// Queries and keys are turned by one call, token by token, so that a row of the table is read once. The backward pass
// is the same turn the other way. Torch-free: herdkern/ops/rope.py checks shapes, positions and borders. Source: Su et
// al. 2021, eq. 34 (arXiv:2104.09864).
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace herdkern::cpu {

// x: (num_tokens, num_heads, head_dim), the last dimension contiguous; strides in elements. out may be x.
struct RopeHeads {
  const void* x = nullptr;
  void* out = nullptr;
  int64_t num_heads = 0;
  int64_t token_stride = 0, head_stride = 0, out_token_stride = 0, out_head_stride = 0;
};

struct Rope {
  int64_t num_tokens, head_dim;
  bool is_bf16, interleaved, inverse, wide_positions;
  int num_threads;
  const float *cos_table, *sin_table;  // (max_position, head_dim / 2)
  // Positions: (num_tokens,) int64 if wide_positions, else int32; all below max_position. Without them tokens count
  // from the last border at or before them, and without borders from 0.
  const void* positions;
  const int32_t* cu_seqlens;  // (num_docs + 1,), from 0 to num_tokens, or null
  int64_t num_docs;
  RopeHeads heads[2];  // queries and keys; a single operand leaves the second empty
};

}  // namespace herdkern::cpu

HK_DECLARE_PER_LEVEL(void rope(const Rope& args);)
