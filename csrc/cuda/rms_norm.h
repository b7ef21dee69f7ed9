// RMSNorm on a GPU: out[r, c] = h[r, c] * rstd[r] * (weight[c] + weight_offset), rstd[r] = 1 / sqrt(mean_c(h[r, c]^2)
// + eps), with h = x or, if there is a residual, x + residual.
// herdkern/ops/rms_norm.py checks shapes. Arithmetic is fp32; Casting says what is rounded in between. Sums have an
// order that depends on sizes alone. Allocates nothing and waits for nothing.
// Source: Zhang & Sennrich 2019, eq. 4 (arXiv:1910.07467).
#pragma once
#include <cstdint>

#include "cuda/elementwise.h"
#include "cuda/stream.h"

namespace herdkern::cuda {

// kLlama: h * rstd is rounded to the type of x. kGemma: nothing is. kNone: every step is. The same for fp32.
enum class Casting : int { kLlama = 0, kGemma = 1, kNone = 2 };

// Rows of inputs lie *_stride elements apart; outputs are contiguous.  weight: (dim,).  rstd: (num_rows,).
struct RmsNormShape {
  int64_t num_rows, dim;
  Element element, weight_element;  // the weight's is x's or fp32
  Casting casting;
  float weight_offset;
};

struct RmsNormForward {
  RmsNormShape shape;
  const void *x, *residual, *weight;  // (num_rows, dim); residual: null for none
  int64_t x_stride, residual_stride;
  float eps;
  void *out, *new_residual;  // type of x; new_residual: x + residual, where there is one
  float* rstd;
};

// dweight is summed per run of rows_per_sum rows into `sums`, then over the runs in order.
struct RmsNormBackward {
  RmsNormShape shape;
  const void *dout, *dresidual, *x, *weight;  // x: what was normed; dresidual: gradient that also reaches it, or null
  int64_t dout_stride, dresidual_stride, x_stride;
  const float* rstd;
  void *dx, *dweight;  // type of x, type of weight.  Null: not wanted
  float* sums;         // (ceil(num_rows / rows_per_sum), dim), where dweight is wanted
  int64_t rows_per_sum;
};

void launch_rms_norm_forward(const RmsNormForward& args, cudaStream_t stream);
void launch_rms_norm_backward(const RmsNormBackward& args, cudaStream_t stream);

}  // namespace herdkern::cuda
