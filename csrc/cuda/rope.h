// Rotary position embedding on a GPU: pair i of each head, (a, b), turns to (a c - b s, b c + a s) by the cosine and
// sine of row position[token] of the table. Pairs are (i, i + head_dim / 2) or, interleaved, (2 i, 2 i + 1). q and k in
// one launch; products are rounded before they are added, as by separate steps. A position outside the table gives NaN.
// herdkern/ops/rope.py checks shapes. Allocates nothing and waits for nothing.
// Source: Su et al. 2021, eq. 34 (arXiv:2104.09864).
#pragma once
#include <cstdint>

#include "cuda/elementwise.h"
#include "cuda/stream.h"

namespace herdkern::cuda {

// (num_tokens, num_heads, head_dim), elements of a head contiguous; out may be x.
struct RopeHeads {
  const void* x;
  void* out;
  int64_t num_heads, x_stride, x_head_stride, out_stride, out_head_stride;
};

struct Rope {
  RopeHeads q, k;             // k may have no heads
  const float *cos, *sin;     // (max_position, head_dim / 2)
  const void* positions;      // (num_tokens,) int32 or, wide, int64; null: as cu_seqlens says
  const int32_t* cu_seqlens;  // (num_docs + 1,): tokens count from 0 in each document; null: from 0 on
  int64_t num_docs, num_tokens, head_dim, max_position;
  Element element;
  bool wide_positions, interleaved, inverse;
};

void launch_rope(const Rope& args, cudaStream_t stream);

}  // namespace herdkern::cuda
