// Cross entropy of a linear layer on the CPU, without the (num_tokens, vocab_size) matrix of logits z:
//   z[t, v] = hidden[t] . weight[v], or c tanh(that / c) with softcap c;  lse[t] = logsumexp_v z[t, v]
//   logps[t] = z[t, target] - lse[t]
//   losses[t] = -(1 - s) logps[t] + s (lse[t] - mean_v z[t, v]) + z_loss lse[t]^2,  s: label smoothing
//   dz[t, v] = a softmax_v + b [v == target] - dlosses[t] s / vocab_size  (TokenTerms), times 1 - (z / c)^2 for softcap
//   dhidden = dz weight,  dweight = dz^T hidden
// Tokens are taken in chunks; the logits of a chunk stay transposed, (vocab_size, chunk), so that every reduction over
// the vocabulary is a vertical one. Sums are fp32; the gradient is made from the same logits, before the next chunk.
// Torch-free: herdkern/ops/linear_cross_entropy.py checks shapes and targets.
// Source: Liger-Kernel technical report 2024, section 3.2 (arXiv:2410.10989); streamed logsumexp: Milakov & Gimelshein
// 2018; z-loss: PaLM 2022, section 5 (arXiv:2204.02311); softcap: Gemma 2 2024, section 2 (arXiv:2408.00118).
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace herdkern::cpu {

enum class Reduction : int { kNone = 0, kSum = 1, kMean = 2 };

// Rows of stats, (kNumStats, num_tokens): the largest logit, the sum of exp(logit - largest), the logit at the target
// (0 where it is not in this shard), the sum of logits (0 without smoothing).
enum Stat : int { kTop, kTotal, kTargetLogit, kLogitSum, kNumStats };

struct LinearCrossEntropy {
  int64_t num_tokens, dim, vocab_size;
  int64_t hidden_stride, weight_stride;  // between rows, in elements
  bool hidden_is_bf16, weight_is_bf16;   // else fp32; an fp32 weight is rounded to bf16 where hidden is bf16
  bool dhidden_is_bf16;                  // else fp32, also with bf16 hidden
  int num_threads;
  const void *hidden, *weight;  // (num_tokens, dim), (vocab_size, dim)
  const int64_t* targets;       // (num_tokens,): ignore_index, a row of weight, or beyond: a row of another shard
  int64_t ignore_index;
  int64_t total_vocab_size;  // of all shards
  float label_smoothing, z_loss, softcap;
  Reduction reduction;
  float* stats;           // (kNumStats, num_tokens)
  bool has_stats;         // stats are read, else written
  float *losses, *logps;  // (num_tokens,), 0 where ignored; null: not wanted
  float* loss;            // sum of losses, or mean over those that count (NaN if none does, as in torch); null: none
  const float *dlosses, *dlogps;  // (num_tokens,); both null: the derivative of `loss`
  void *dhidden, *dweight;        // contiguous, shapes of hidden and weight, dweight in the dtype of weight; null: none
};

}  // namespace herdkern::cpu

HK_DECLARE_PER_LEVEL(void linear_cross_entropy(const LinearCrossEntropy& args);)
