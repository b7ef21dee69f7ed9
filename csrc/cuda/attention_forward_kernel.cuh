// Forward pass: a block of threads owns a tile of queries and walks over the blocks of keys that it sees with a running
// softmax; scores and probabilities stay in registers.
//
// K and V of the blocks of keys go through a ring of slots in shared memory, K0 V0 K1 V1 ...; a slot is filled again as
// soon as all warps are past it, so num_slots - 1 operands are under way. Only blocks at a border of the mask are
// masked.
#pragma once
#include "cuda/attention_rows.cuh"
#include "cuda/attention_sizes.h"

namespace herdkern::cuda {

// Of each row: the largest logit and the sum of this thread's weights, in units of log 2.
template <int kM>
struct RunningSoftmax {
  float top[kM][2], sum[kM][2];
};

// Scores become weights exp2(factor * score - top); sums and outputs so far are scaled to the new top.
template <int kM, int kN, int kOut>
HK_DEVICE void online_softmax(float factor, float (&scores)[kM][kN][4], RunningSoftmax<kM>* state,
                              float (&out)[kM][kOut][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = fmaxf(scores[m][0][2 * half], scores[m][0][2 * half + 1]);
#pragma unroll
      for (int n = 1; n < kN; ++n) top = fmaxf(top, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
      top = fmaxf(state->top[m][half], warp_max(top, 4) * factor);
      const float base = top == kNegInfinity ? 0.0f : top;  // sees no key so far: weights 0
      const float keep = exp2_approx(state->top[m][half] - base);
      float sum = state->sum[m][half] * keep;
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          scores[m][n][e] = exp2_approx(fmaf(scores[m][n][e], factor, -base));
          sum += scores[m][n][e];
        }
#pragma unroll
      for (int n = 0; n < kOut; ++n) {
        out[m][n][2 * half] *= keep;
        out[m][n][2 * half + 1] *= keep;
      }
      state->top[m][half] = top;
      state->sum[m][half] = sum;
    }
}

// What a row's sums are multiplied by, and its lse. sink: the row's, in units of log 2; -inf for none.
HK_DEVICE float finish_row(float top, float sum, float sink, float* lse) {
  const float base = fmaxf(top, sink);
  if (base == kNegInfinity) {
    *lse = kNegInfinity;
    return 0.0f;
  }
  const float weight = exp2_approx(top - base), total = fmaf(sum, weight, exp2_approx(sink - base));
  *lse = (base + log2f(total)) * kLn2;
  return weight / total;
}

template <typename T, int kDim>
__global__ void __launch_bounds__(ForwardSizes<kDim>::kThreads) attention_forward_kernel(const AttentionForward args) {
  using Sizes = ForwardSizes<kDim>;
  constexpr int kM = Sizes::kRowTiles, kKeys = Sizes::kKeys;
  HK_DYNAMIC_SHARED(memory);
  const int per_tile = static_cast<int>(args.shape.num_kv_heads) * args.fold.folds;
  const int tile_index = static_cast<int>(blockIdx.x) / per_tile, part = static_cast<int>(blockIdx.x) % per_tile;
  if (tile_index >= *args.tiles.count) return;
  const Tile tile = args.tiles.tiles[tile_index];
  const int kv_head = part / args.fold.folds, head_dim = static_cast<int>(args.shape.head_dim);
  const Rows doc = Rows::of(args.shape, args.softmax, tile.doc);
  const QueryBlock block = QueryBlock::of(args.shape, args.fold, doc, tile.begin, kv_head, part % args.fold.folds);

  const int begin = doc.keys_begin(block.position) / kKeys * kKeys, end = doc.keys_end(block.last());
  const int num_operands = end > begin ? (end - begin + kKeys - 1) / kKeys * 2 : 0;
  const Shared q_tile = shared_address(memory), slots = q_tile + Sizes::kQueryBytes;
  const T *k_rows = key_rows<T>(args.k, doc, kv_head), *v_rows = key_rows<T>(args.v, doc, kv_head);
  const auto copy_operand = [&](int i, int slot) {
    if (i < num_operands) {
      const bool values = i % 2 != 0;
      copy_keys<kDim, kKeys, Sizes::kThreads>(slots + slot * Sizes::kSlotBytes, head_dim, values ? v_rows : k_rows,
                                              values ? args.v.token_stride : args.k.token_stride, begin + i / 2 * kKeys,
                                              doc.k_len);
    }
    commit_copies();
  };
  int operand = 0, slot = 0;
  const auto next_operand = [&] {  // the slot that holds it
    wait_pending(args.num_slots - 2);
    __syncthreads();  // also: all warps are past the operand before it, whose slot is filled now
    copy_operand(operand++ + args.num_slots - 1, before(slot, args.num_slots));
    const Shared here = slots + slot * Sizes::kSlotBytes;
    slot = after(slot, args.num_slots);
    return here;
  };

  if (num_operands > 0)
    copy_tile<kDim, Sizes::kRows, Sizes::kThreads>(q_tile, head_dim, static_cast<const T*>(args.q.data),
                                                   [&](int row) { return input_row<T>(args.q, doc, block, row); });
  for (int i = 0; i < args.num_slots - 1; ++i) copy_operand(i, i);

  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row = warp * 16 * kM, all_begin = doc.keys_begin(block.last()), all_end = doc.keys_end(block.position);
  float out[kM][kDim / 8][4];
  set_zero(out);
  RunningSoftmax<kM> state;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      state.top[m][half] = kNegInfinity;
      state.sum[m][half] = 0.0f;
    }
  for (int key = begin; key < end; key += kKeys) {
    float scores[kM][kKeys / 8][4];
    score_product<T, kDim>(q_tile, row, next_operand(), 0, lane, scores);
    if (args.softmax.capped) cap_scores(args.softmax.inner, scores);
    if (key < all_begin || key + kKeys > all_end) mask_scores(doc, block, row, key, lane, scores);
    online_softmax(args.softmax.factor, scores, &state, out);
    uint32_t weights[kM][kKeys / 16][4];
    round_scores<T>(scores, weights);
    sum_product<T, kDim>(weights, next_operand(), 0, lane, out);
  }

  float factor[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int query, head;
      const bool valid = block.find(row + 16 * m + 8 * half + lane / 4, &query, &head);
      const bool has_sink = valid && args.shape.sinks != nullptr;
      const float sink = has_sink ? args.shape.sinks[head] : kNegInfinity, sum = warp_sum(state.sum[m][half], 4);
      float lse;
      factor[m][half] = finish_row(state.top[m][half], sum, sink * kLog2E, &lse);
      if (valid && lane % 4 == 0)
        args.lse[head * args.shape.total_q + doc.q_begin + block.position + query] = sum == 0.0f ? sink : lse;
    }
  put_rows<T, kDim>(memory, row, 0, lane, out, [&](int m, int half) { return factor[m][half]; });
  __syncwarp();
  write_rows<kDim, T>(memory, row, 16 * kM, lane, head_dim,
                      [&](int r) { return output_row<T>(args.out, args.shape, args.shape.head_dim, doc, block, r); });
}

}  // namespace herdkern::cuda
