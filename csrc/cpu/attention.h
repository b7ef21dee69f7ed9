// Packed attention on the CPU: for each document and head, out = softmax(scale * q k^T + mask) v, and its gradients.
// Query head h reads key-value head h / (num_heads / num_kv_heads); nothing is expanded. No tile crosses a border of
// documents. Bit-identical for any number of threads.
//
// Storage is fp32 or bf16, sums and softmax are fp32. Where storage is bf16, head_dim > 16 and the processor multiplies
// bf16 (AMX, AVX512_BF16), probabilities and dS are rounded to bf16 before the products that follow, as on a GPU.
//
// Source: Dao 2023, "FlashAttention-2" (arXiv:2307.08691), algorithms 1 and 2.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace herdkern::cpu {

// q, out, dout, dq: (total_q, num_heads, head_dim).  k, v, dk, dv: (total_k, num_kv_heads, head_dim).
// Strides are in elements, the last dimension is dense.  cu_q, cu_k: (num_docs + 1,), checked by check_borders.
struct AttentionShape {
  const int32_t *cu_q, *cu_k;
  int64_t num_docs, total_q, total_k, num_heads, num_kv_heads, head_dim;
  float scale;
  bool causal, bf16;
  int num_threads;
};

// An operand whose tokens and heads lie at any stride.
struct AttentionInput {
  const void* data;
  int64_t token_stride, head_stride;
};

struct AttentionForward {
  AttentionShape shape;
  AttentionInput q, k, v;
  void* out;   // contiguous, type of q
  float* lse;  // (num_heads, total_q): log sum_j exp(scale * q k_j); -inf where no key is visible
};

struct AttentionBackward {
  AttentionShape shape;
  AttentionInput q, k, v, out, dout;
  const float* lse;
  void *dq, *dk, *dv;  // contiguous, type of q
};

}  // namespace herdkern::cpu

HK_DECLARE_PER_LEVEL(void attention_forward(const AttentionForward& args);
                     void attention_backward(const AttentionBackward& args);
                     // The same on bf16 products; the two above go there at levels avx512 and amx.
                     void attention_forward_bf16(const AttentionForward& args);
                     void attention_backward_bf16(const AttentionBackward& args);)
