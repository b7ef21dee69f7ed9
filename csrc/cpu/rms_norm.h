// RMSNorm on the CPU: out[r, c] = x[r, c] * rstd[r] * weight[c],  rstd[r] = 1 / sqrt(mean_c(x[r, c]^2) + eps).
// Torch-free: herdkern/ops/rms_norm.py checks shapes. Arithmetic is fp32 whatever the storage type.
// Source: Zhang & Sennrich 2019, eq. 4 (arXiv:1910.07467).
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace herdkern::cpu {

// x: (num_rows, dim), rows x_stride elements apart.  weight: (dim,), bf16 only if x is.  rstd: (num_rows,).
struct RmsNormShape {
  int64_t num_rows, dim, x_stride;
  bool bf16_x, bf16_weight;
  int num_threads;
};

struct RmsNormForward {
  RmsNormShape shape;
  const void *x, *weight;
  float eps;
  void* out;  // (num_rows, dim) contiguous, type of x
  float* rstd;
};

struct RmsNormBackward {
  RmsNormShape shape;
  const void *dout, *x, *weight;  // dout: type of x, rows dout_stride elements apart
  int64_t dout_stride;
  const float* rstd;
  void *dx, *dweight;  // dx: (num_rows, dim) contiguous, type of x.  dweight: (dim,), type of weight.  Null: not wanted
};

}  // namespace herdkern::cpu

HK_DECLARE_PER_LEVEL(void rms_norm_forward(const RmsNormForward& args);
                     void rms_norm_backward(const RmsNormBackward& args);)
