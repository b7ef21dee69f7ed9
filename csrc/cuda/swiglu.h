// SwiGLU on a GPU: out = silu(gate) * up with silu(g) = g / (1 + e^-g); in fp32, rounded once. The backward pass
// computes the sigmoid again. herdkern/ops/swiglu.py checks shapes. Allocates nothing and waits for nothing. Source:
// Shazeer 2020, section 2 (arXiv:2002.05202).
#pragma once
#include <cstdint>

#include "cuda/elementwise.h"
#include "cuda/stream.h"

namespace herdkern::cuda {

// Rows lie *_stride elements apart, which holds packed tensors, [gate | up], as well; `out` is contiguous.
struct SwigluForward {
  int64_t num_rows, dim;
  Element element;
  const void *gate, *up;  // (num_rows, dim)
  int64_t gate_stride, up_stride;
  void* out;
};

struct SwigluBackward {
  int64_t num_rows, dim;
  Element element;
  const void *dout, *gate, *up;
  int64_t dout_stride, gate_stride, up_stride, grad_stride;  // grad_stride: of dgate and dup
  void *dgate, *dup;                                         // null: not wanted
};

void launch_swiglu_forward(const SwigluForward& args, cudaStream_t stream);
void launch_swiglu_backward(const SwigluBackward& args, cudaStream_t stream);

}  // namespace herdkern::cuda
