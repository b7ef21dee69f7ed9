// AdamW over any number of tensors in one call, for each element (g: gradient times grad_scale, negated to maximise):
//   w -= lr * weight_decay * w,  m = lerp(m, g, 1 - beta1),  v = beta2 v + (1 - beta2) g^2,
//   w -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
// w is the parameter itself or its fp32 master. Moments and all arithmetic are fp32. The clip by the global norm reads
// the gradients once, before the update, and is a factor inside it. Tensors are cut into chunks of one size, and sums
// over chunks are taken in their order: the number of threads changes no bit. Torch-free: herdkern/ops/adamw.py checks.
// Source: Loshchilov & Hutter 2019, algorithm 2 (arXiv:1711.05101); stochastic rounding: Philox4x32-10, Salmon et al.
// 2011 (doi:10.1145/2063384.2063405).
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace herdkern::cpu {

enum class Float : int { k32 = 0, kB16 = 1, k16 = 2 };

struct AdamwSettings {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};

// All arrays have `count` elements in the same order; none overlaps another.
struct AdamwTensor {
  void* param;
  const void* grad;
  float *exp_avg, *exp_avg_sq;
  float* master;  // the fp32 value behind a 16-bit parameter, or null
  float* step;    // one number: how many updates there were; counted up
  int64_t count;
  Float param_type, grad_type;
  uint32_t stream;  // which of the random sequences rounds this tensor
  AdamwSettings settings;
};

struct Adamw {
  const AdamwTensor* tensors;
  int64_t num_tensors;
  double max_grad_norm;  // 0: the norm is not computed
  bool stochastic;       // bf16 parameters without a master round up or down at random
  uint64_t seed;
  int num_threads;
};

}  // namespace herdkern::cpu

// adamw: the norm of all gradients before the clip, or 0 if it is not computed. Where it is not finite nothing has been
// changed.
HK_DECLARE_PER_LEVEL(double adamw(const Adamw& args);
                     double grad_norm(const AdamwTensor* tensors, int64_t num_tensors, int num_threads);)
