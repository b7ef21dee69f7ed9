// Attention on a paged key-value cache, for generation: csrc/cuda/paged_attention_kernel.cuh says how it runs. bf16 and
// fp16; scores, softmax and sums in fp32, weights never rounded.
//
// A document's keys are cut into splits of kSplitKeys, counted from its first key, each the work of one block for each
// key-value head; a row that sees keys of several splits is put together by a second kernel. So bits depend on the
// document alone, and a long document alone still fills the device. A page number outside of the cache gives NaN.
// Who checks: herdkern/ops/paged_attention.py. Nothing waits for the device, nothing is allocated.
// Source: Kwon et al. 2023 (arXiv:2309.06180); splits: Dao et al. 2023, "Flash-Decoding".
#pragma once
#include <cstdint>

#include "common/tile_list.h"
#include "cuda/stream.h"

namespace herdkern::cuda {

constexpr int32_t kSplitKeys = 512;

// Strides in elements; the head_dim numbers of a row lie side by side and begin at a multiple of 16 bytes.
// q: (total_q, num_heads, head_dim).  k, v: (num_pages, page_size, num_kv_heads, head_dim).  head_dim: a multiple of 8,
// at most 256.  Key j of document d is row j % page_size of page table[d * table_stride + j / page_size].
struct PagedAttention {
  const void *q, *k, *v;
  int64_t q_token, q_head, k_page, k_token, k_head, v_page, v_token, v_head;
  const int32_t* table;
  int64_t table_stride;
  int32_t page_size, num_pages;
  const int32_t *cu_q, *cu_k;  // (num_docs + 1,), cu_k: sums of the documents' numbers of keys
  int32_t num_docs, num_heads, num_kv_heads, head_dim;
  int64_t total_q, max_keys;  // max_keys: what a row of the table has room for
  float scale, softcap;       // softcap: 0 for none
  Window window;
  const float* sinks;  // (num_heads,) or null
  bool is_bfloat16;
  void* out;   // (total_q, num_heads, head_dim), type of q
  float* lse;  // (num_heads, total_q)
};

// Bytes of device memory that a launch needs beside its operands, from shapes alone.
int64_t paged_attention_workspace_bytes(int64_t total_q, int64_t num_docs, int64_t num_heads, int64_t head_dim,
                                        int64_t max_keys);
void launch_paged_attention(const PagedAttention& args, void* workspace, cudaStream_t stream);

}  // namespace herdkern::cuda
