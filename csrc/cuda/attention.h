// Packed attention on NVIDIA GPUs of capability 8.0 and later: the formulas and the mask of csrc/cpu/attention.h with
// storage bf16 or fp16, products of 16-bit numbers summed in fp32, softmax in fp32. P and dS are rounded to the storage
// type before the products that follow. delta = rowsum(dout * out) is taken from `out` as stored.
//
// No atomics: the tile of a list owns its rows of out and dq, or of dk and dv. How a document is cut depends on the
// document alone, so no bit depends on its neighbours, on their order or on the order of the tiles. Nothing waits for
// the device: borders are read there, and a grid covers what a list can hold at most.
//
// Who checks: herdkern/ops/attention.py (shapes, dtypes) and herdkern/ops/attention_cuda.py (strides, alignment).
// Source: Dao 2023, "FlashAttention-2" (arXiv:2307.08691), algorithms 1 and 2.
#pragma once
#include <cstdint>

#include "common/attention_tiles.h"
#include "common/tile_list.h"
#include "cuda/stream.h"

namespace herdkern::cuda {

enum class Storage : int { kBfloat16 = 1, kFloat16 = 2 };  // as herdkern::cpu::Storage

// An operand whose tokens and heads lie at any stride, in elements; rows of head_dim elements begin at 16 bytes.
struct AttentionInput {
  const void* data;
  int64_t token_stride, head_stride;
};

// A block of queries of one document holds `positions` of them and, side by side, `heads` query heads of one key-value
// head: row r is query r / heads. A group of more heads than a block has rows is cut into `folds`.
struct QueryFold {
  int heads, folds, positions, reciprocal;

  static QueryFold of(int64_t group, int rows) {
    const RowFold fold = RowFold::of(group, rows);
    const int heads = static_cast<int>(fold.heads);
    return {heads, static_cast<int>(ceil_div(group, heads)), static_cast<int>(fold.positions), 65535 / heads + 1};
  }
  HK_HOST_DEVICE int query(int row) const { return row * reciprocal >> 16; }  // row / heads, exact below 256
};

// q, out, dout, dq: (total_q, num_heads, head_dim).  k, v, dk, dv: (total_k, num_kv_heads, head_dim).
// head_dim: a multiple of 8, at most 256.  cu_q, cu_k: (num_docs + 1,) on the device.
struct AttentionShape {
  const int32_t *cu_q, *cu_k;
  int64_t num_docs, total_q, total_k, num_heads, num_kv_heads, head_dim;
  float scale, softcap;  // softcap: 0 for none
  Window window;
  const float* sinks;  // (num_heads,) or null
  Storage storage;

  HK_HOST_DEVICE int64_t group() const { return num_heads / num_kv_heads; }
};

// What the host works out once for all threads, in registers nowhere. A logit in units of log 2 is factor * score, or
// factor * tanh(inner * score) if capped. left, right: the window in 32 bits.
struct SoftmaxConstants {
  float inner, factor;
  int32_t capped, left, right;

  static SoftmaxConstants of(const AttentionShape& shape) {
    constexpr float kLog2E = 1.4426950408889634f;
    const bool capped = shape.softcap > 0.0f;
    return {capped ? shape.scale / shape.softcap : 0.0f, (capped ? shape.softcap : shape.scale) * kLog2E, capped,
            static_cast<int32_t>(clamp(shape.window.left, 0, INT32_MAX)),
            static_cast<int32_t>(clamp(shape.window.right, 0, INT32_MAX))};
  }
};

struct TileList {
  const Tile* tiles;
  const int32_t* count;
  int64_t capacity;
};

struct AttentionForward {
  AttentionShape shape;
  AttentionInput q, k, v;
  void* out;   // contiguous, type of q
  float* lse;  // (num_heads, total_q)
  SoftmaxConstants softmax;
  TileList tiles;  // of queries
  QueryFold fold;
  int num_slots;  // of shared memory for keys and values under way
};

struct AttentionBackward {
  AttentionShape shape;
  AttentionInput q, k, v, out, dout;
  const float* lse;
  void *dq, *dk, *dv;  // contiguous, type of q
  float* dsinks;       // (num_heads,) or null
  float* row_values;   // (2, num_heads, total_q): lse * log2(e), 0 where a query sees no key; delta
  SoftmaxConstants softmax;
  TileList query_tiles, key_tiles;
  QueryFold fold;  // of a tile of queries (dq) or of a block of them (dk, dv)
  int num_slots;
};

// What a launch needs beside its operands, from shapes alone.
int64_t attention_workspace_bytes(const AttentionShape& shape, bool backward);

// `workspace`: attention_workspace_bytes of device memory. Sets what stands below the outputs in `args`.
void launch_attention_forward(AttentionForward args, void* workspace, cudaStream_t stream);
void launch_attention_backward(AttentionBackward args, void* workspace, cudaStream_t stream);

}  // namespace herdkern::cuda
