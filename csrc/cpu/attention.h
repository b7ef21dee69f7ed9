// Packed attention on the CPU: for each document and head, out = softmax(cap(scale * q k^T) + mask) v, and its
// gradients. Query head h reads key-value head h / (num_heads / num_kv_heads); nothing is expanded. No score outside a
// document is computed. Bit-identical for any number of threads and any order of the documents.
//
// cap(s) = softcap * tanh(s / softcap), or s where softcap is 0. A sink is one more logit in each row's softmax,
// sinks[h], not scaled, capped or masked, which takes weight and has no value: lse = log(sum_j exp(s_j) +
// exp(sinks[h])).
//
// Storage is fp32, bf16 or fp16; sums and softmax are fp32. Where storage is bf16, head_dim > 16 and the processor
// multiplies bf16 (AMX, AVX512_BF16), probabilities and dS are rounded to bf16 before the products that follow, as on a
// GPU. Everything else is multiplied in fp32. The backward takes delta = rowsum(dout * out) from `out` as stored, hence
// rounded where storage is 16 bits, for rows whose keys span several of its chunks; dsinks and dS carry that rounding.
//
// Source: Dao 2023, "FlashAttention-2" (arXiv:2307.08691), algorithms 1 and 2.
#pragma once
#include <cstdint>

#include "common/attention_tiles.h"
#include "cpu/isa.h"

namespace herdkern::cpu {

enum class Storage : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// q, out, dout, dq: (total_q, num_heads, head_dim).  k, v, dk, dv: (total_k, num_kv_heads, head_dim).
// Strides are in elements, the last dimension is dense.  cu_q, cu_k: (num_docs + 1,), checked by check_borders.
struct AttentionShape {
  const int32_t *cu_q, *cu_k;
  int64_t num_docs, total_q, total_k, num_heads, num_kv_heads, head_dim;
  float scale, softcap;  // softcap: 0 for none
  Window window;
  const float* sinks;  // (num_heads,) or null
  Storage storage;
  int num_threads;

  Document document(int64_t doc) const { return document_at(cu_q, cu_k, doc, window); }
};

// An operand whose tokens and heads lie at any stride.
struct AttentionInput {
  const void* data;
  int64_t token_stride, head_stride;
};

// Where the keys of document d lie in a paged cache: key j is token j % size of page table[d * table_stride + j /
// size], pages page_stride elements apart in k and v alike. `table` is null where k and v are packed; then cu_k says
// where keys begin. Where it is not, cu_k holds the running sum of the documents' lengths and nothing else.
struct PagedKeys {
  const int32_t* table = nullptr;
  int64_t table_stride = 0, size = 0, k_page_stride = 0, v_page_stride = 0;
};

struct AttentionForward {
  AttentionShape shape;
  AttentionInput q, k, v;
  PagedKeys pages;
  void* out;   // contiguous, type of q
  float* lse;  // (num_heads, total_q): log of the softmax denominator; where no key is visible the sink, else -inf
};

struct AttentionBackward {
  AttentionShape shape;
  AttentionInput q, k, v, out, dout;
  const float* lse;
  void *dq, *dk, *dv;  // contiguous, type of q
  float* dsinks;       // (num_heads,) or null: -sum_i exp(sinks - lse_i) * (dout_i . out_i), added up in a fixed order
};

}  // namespace herdkern::cpu

HK_DECLARE_PER_LEVEL(void attention_forward(const AttentionForward& args);
                     void attention_backward(const AttentionBackward& args);
                     // The same on bf16 products; the two above go there at levels avx512 and amx.
                     void attention_forward_bf16(const AttentionForward& args);
                     void attention_backward_bf16(const AttentionBackward& args);)
