// SwiGLU on the CPU: out = silu(gate) * up with silu(g) = g / (1 + e^-g); elementwise, fp32 arithmetic.
// Torch-free: herdkern/ops/swiglu.py checks shapes. The backward pass recomputes silu: nothing is saved but the inputs.
// Source: Shazeer 2020, section 2 (arXiv:2002.05202).
#pragma once
#include <cstdint>

#include "cpu/element.h"
#include "cpu/isa.h"

namespace herdkern::cpu {

// All arrays are (num_rows, dim) of one type with rows *_stride elements apart; out is contiguous.
struct SwigluForward {
  int64_t num_rows, dim, gate_stride, up_stride;
  Element element;
  int num_threads;
  const void *gate, *up;
  void* out;
};

struct SwigluBackward {
  int64_t num_rows, dim, dout_stride, gate_stride, up_stride;
  int64_t dgate_stride, dup_stride;
  Element element;
  int num_threads;
  const void *dout, *gate, *up;
  void *dgate, *dup;  // null: not wanted
};

}  // namespace herdkern::cpu

HK_DECLARE_PER_LEVEL(void swiglu_forward(const SwigluForward& args); void swiglu_backward(const SwigluBackward& args);)
