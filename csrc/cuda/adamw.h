// AdamW over any number of tensors in one launch, for each element (g: gradient times the clip, negated to maximise):
//   w = keep w - step_size m' / (sqrt(v') / root_correction + eps),  m' = lerp(m, g, 1 - beta1),
//   v' = beta2 v + (1 - beta2) g^2
// w is the parameter itself or its fp32 master. Arithmetic is fp32 in the order of csrc/cpu/adamw.h: the same bits. A
// block finds its tensor by a search in a table of rows in device memory. The norm of all gradients stays on the
// device, where the update reads it; sums have an order that depends on sizes alone. herdkern/ops/adamw.py checks.
// Source: Loshchilov & Hutter 2019, algorithm 2 (arXiv:1711.05101); stochastic rounding: Philox4x32-10, Salmon et al.
// 2011 (doi:10.1145/2063384.2063405).
#pragma once
#include <cstdint>

#include "cuda/elementwise.h"
#include "cuda/stream.h"

namespace herdkern::cuda {

constexpr int64_t kAdamwBlock = 8192;  // elements of a block; a multiple of what a Philox call rounds

// All arrays have `count` elements in the same order; none overlaps another.
struct AdamwRow {
  void* param;
  const void* grad;
  float *exp_avg, *exp_avg_sq;
  float* master;               // the fp32 value behind a 16-bit parameter, or null
  int64_t count, first_block;  // blocks of this tensor begin there
  uint32_t step, stream;       // counted from 1; which of the random sequences rounds this tensor
  Element param_type, grad_type;
  int32_t is_aligned;      // all addresses are multiples of 16
  int32_t lerp_from_grad;  // which end of lerp is nearer
  float grad_sign, keep, lerp_weight, beta2, one_minus_beta2, root_correction, eps, minus_step_size;
};

struct AdamwSettings {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};

// What the numbers of a row are for its settings and step; on the host, rounded to fp32 once.
void set_factors(const AdamwSettings& settings, AdamwRow& row);

struct Adamw {
  const AdamwRow* table;  // in device memory, as is all below
  int64_t num_tensors, num_blocks;
  const double* norm_and_scale;  // null: no clip. Where the norm is not finite nothing is changed
  bool stochastic;               // bf16 parameters without a master round up or down at random
  uint64_t seed;
};

struct GradNorm {
  const AdamwRow* table;  // grad, grad_type, count, first_block and is_aligned are read
  int64_t num_tensors, num_blocks;
  double* sums;            // (num_blocks,)
  double* norm_and_scale;  // what comes out: the norm, min(1, max_grad_norm / (norm + 1e-6))
  double max_grad_norm;
};

void launch_adamw(const Adamw& args, cudaStream_t stream);
void launch_grad_norm(const GradNorm& args, cudaStream_t stream);

}  // namespace herdkern::cuda
