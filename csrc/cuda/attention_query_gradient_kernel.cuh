// Backward pass, dQ: a block of threads owns a tile of queries, as in the forward pass, and walks over the keys it
// sees:
//   S = Q K^T,  P = exp(cap(scale * S) - lse),  dP = dO V^T,  dS = P * (dP - delta) * cap',  dQ = scale * dS K
// Before that it takes delta = rowsum(dO * O) of its rows and leaves it, beside lse, for the pass that makes dK and dV.
#pragma once
#include "cuda/attention_rows.cuh"
#include "cuda/attention_sizes.h"

namespace herdkern::cuda {

// lse in units of log 2 (0 where a query sees no key) and delta of a warp's own rows, to args.row_values and to `kept`:
// (2, kRows) in shared memory. dout_tile has landed.
template <typename T, int kDim>
HK_DEVICE void find_row_values(const AttentionBackward& args, const Rows& doc, const QueryBlock& block,
                               const unsigned char* dout_tile, int row, int lane, float* kept) {
  using Layout = TileLayout<kDim>;
  constexpr int kRows = QueryGradientSizes<kDim>::kRows, kOwn = 16 * QueryGradientSizes<kDim>::kRowTiles;
  for (int i = 0; i < kOwn; i += kWarp / Layout::kLanes) {
    const int r = row + i + lane / Layout::kLanes;
    const T* out = input_row<T>(args.out, doc, block, r);
    float delta = 0.0f;
    if (out != nullptr) {
#pragma unroll
      for (int c = 0; c < Layout::kChunks / Layout::kLanes; ++c) {
        const int chunk = lane % Layout::kLanes + c * Layout::kLanes;
        if (8 * chunk >= args.shape.head_dim) continue;
        const Pack<T, 8> x = load<8>(out + 8 * chunk);
        const Pack<T, 8> dx = load<8>(reinterpret_cast<const T*>(dout_tile + Layout::offset(r, chunk)));
#pragma unroll
        for (int j = 0; j < 8; ++j) delta = fmaf(x[j], dx[j], delta);
      }
    }
    delta = warp_sum(delta, Layout::kLanes);
    if (lane % Layout::kLanes != 0) continue;
    float lse = 0.0f;
    if (out != nullptr) {
      int query, head;
      block.find(r, &query, &head);
      const int64_t at = head * args.shape.total_q + doc.q_begin + block.position + query;
      lse = args.lse[at] == kNegInfinity ? 0.0f : args.lse[at] * kLog2E;
      args.row_values[at] = lse;
      args.row_values[args.shape.num_heads * args.shape.total_q + at] = delta;
    }
    kept[r] = lse;
    kept[kRows + r] = delta;
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(QueryGradientSizes<kDim>::kThreads)
    attention_query_gradient_kernel(const AttentionBackward args) {
  using Sizes = QueryGradientSizes<kDim>;
  constexpr int kM = Sizes::kRowTiles, kKeys = Sizes::kKeys, kTileBytes = 2 * Sizes::kRows * kDim;
  HK_DYNAMIC_SHARED(memory);
  const int per_tile = static_cast<int>(args.shape.num_kv_heads) * args.fold.folds;
  const int tile_index = static_cast<int>(blockIdx.x) / per_tile, part = static_cast<int>(blockIdx.x) % per_tile;
  if (tile_index >= *args.query_tiles.count) return;
  const Tile tile = args.query_tiles.tiles[tile_index];
  const int kv_head = part / args.fold.folds, head_dim = static_cast<int>(args.shape.head_dim);
  const Rows doc = Rows::of(args.shape, args.softmax, tile.doc);
  const QueryBlock block = QueryBlock::of(args.shape, args.fold, doc, tile.begin, kv_head, part % args.fold.folds);

  const int begin = doc.keys_begin(block.position) / kKeys * kKeys, end = doc.keys_end(block.last());
  const Shared q_tile = shared_address(memory), dout_tile = q_tile + kTileBytes, slots = q_tile + Sizes::kQueryBytes;
  const T *k_rows = key_rows<T>(args.k, doc, kv_head), *v_rows = key_rows<T>(args.v, doc, kv_head);
  const auto copy_block = [&](int key, int slot) {
    if (key < end) {
      const Shared to = slots + slot * Sizes::kSlotBytes;
      copy_keys<kDim, kKeys, Sizes::kThreads>(to, head_dim, k_rows, args.k.token_stride, key, doc.k_len);
      copy_keys<kDim, kKeys, Sizes::kThreads>(to + Sizes::kSlotBytes / 2, head_dim, v_rows, args.v.token_stride, key,
                                              doc.k_len);
    }
    commit_copies();
  };

  const auto copy_rows = [&](Shared to, const AttentionInput& x) {
    copy_tile<kDim, Sizes::kRows, Sizes::kThreads>(to, head_dim, static_cast<const T*>(x.data),
                                                   [&](int row) { return input_row<T>(x, doc, block, row); });
  };
  copy_rows(dout_tile, args.dout);
  if (begin < end) copy_rows(q_tile, args.q);
  commit_copies();
  for (int i = 0; i < args.num_slots - 1; ++i) copy_block(begin + i * kKeys, i);
  wait_pending(args.num_slots - 1);
  __syncthreads();

  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row = warp * 16 * kM, all_begin = doc.keys_begin(block.last()), all_end = doc.keys_end(block.position);
  float* kept = reinterpret_cast<float*>(memory + 2 * kTileBytes);
  find_row_values<T, kDim>(args, doc, block, memory + kTileBytes, row, lane, kept);
  __syncwarp();

  float dq[kM][kDim / 8][4];
  set_zero(dq);
  for (int key = begin, slot = 0; key < end; key += kKeys, slot = after(slot, args.num_slots)) {
    wait_pending(args.num_slots - 2);
    __syncthreads();  // also: all warps are past the slot before it, which is filled now
    copy_block(key + (args.num_slots - 1) * kKeys, before(slot, args.num_slots));
    if (args.num_slots == 1) {
      wait_copies<0>();
      __syncthreads();
    }
    const Shared k_tile = slots + slot * Sizes::kSlotBytes;
    lane = not_hoisted(lane);
    float scores[kM][kKeys / 8][4], dp[kM][kKeys / 8][4];
    score_product<T, kDim>(q_tile, row, k_tile, 0, lane, scores);
    score_product<T, kDim>(dout_tile, row, k_tile + Sizes::kSlotBytes / 2, 0, lane, dp);
    if (args.softmax.capped) cap_scores(args.softmax.inner, scores);
    if (key < all_begin || key + kKeys > all_end) mask_scores(doc, block, row, key, lane, scores);
    score_gradients(args.softmax, scores, dp, [&](int m, int, int e) {
      const float* value = kept + row + 16 * m + 8 * (e / 2) + lane / 4;
      return make_float2(value[0], value[Sizes::kRows]);
    });
    uint32_t ds[kM][kKeys / 16][4];
    round_scores<T>(dp, ds);
    sum_product<T, kDim>(ds, k_tile, 0, lane, dq);
  }

  __syncwarp();  // the warp has read its rows of Q
  put_rows<T, kDim>(memory, row, 0, lane, dq, [&](int, int) { return args.shape.scale; });
  __syncwarp();
  write_rows<kDim, T>(memory, row, 16 * kM, lane, head_dim,
                      [&](int r) { return output_row<T>(args.dq, args.shape, args.shape.head_dim, doc, block, r); });
}

}  // namespace herdkern::cuda
