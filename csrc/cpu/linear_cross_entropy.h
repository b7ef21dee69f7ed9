// Cross entropy of a linear layer on the CPU, without the (num_tokens, vocab_size) matrix of logits:
//   losses[t] = logsumexp_v(x[t] . weight[v]) - x[t] . weight[targets[t]]
//   dlogits[t, v] = (softmax_v - [v == targets[t]]) * scale[t],  dx = dlogits weight,  dweight = dlogits^T x
// Tokens are taken in chunks; the logits of a chunk stay transposed, (vocab_size, chunk), so that every reduction over
// the vocabulary is a vertical one. Sums are fp32; the gradient is made from the same logits, before the next chunk.
// Torch-free: herdkern/ops/linear_cross_entropy.py checks shapes and targets.
// Source: Liger-Kernel technical report 2024, section 3.2 (arXiv:2410.10989); streamed logsumexp: Milakov & Gimelshein
// 2018.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace herdkern::cpu {

enum class Reduction : int { kNone = 0, kSum = 1, kMean = 2 };

struct LinearCrossEntropy {
  int64_t num_tokens, dim, vocab_size;
  int64_t x_stride, weight_stride;  // between rows, in elements
  bool is_bf16;                     // x and weight; else fp32
  int num_threads;
  const void *x, *weight;  // (num_tokens, dim), (vocab_size, dim)
  const int64_t* targets;  // (num_tokens,), each ignore_index or in [0, vocab_size)
  int64_t ignore_index;
  Reduction reduction;
  float* losses;  // (num_tokens,), 0 where ignored
  float* loss;    // their sum or the mean over those that count (NaN if none does, as in torch); null: not wanted
  const float* dlosses;  // (num_tokens,) scale of each token's gradient; null: the derivative of `loss`
  float *dx, *dweight;   // contiguous, shapes of x and weight; null: not wanted
};

}  // namespace herdkern::cpu

HK_DECLARE_PER_LEVEL(void linear_cross_entropy(const LinearCrossEntropy& args);)
