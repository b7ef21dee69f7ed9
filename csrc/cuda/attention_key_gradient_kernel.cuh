// Backward pass, dK and dV: a block of threads owns a tile of keys of one key-value head and walks over the blocks of
// queries that see it, for every query head of the group, in a fixed order. All products are transposed:
//   S^T = K Q^T,  dP^T = V dO^T,  dV = P^T dO,  dK = scale * dS^T Q
// so that P^T and dS^T are left operands where they were computed, in registers; only above head_dim 128, where two
// warps share their keys, do they pass through shared memory.
#pragma once
#include "cuda/attention_rows.cuh"
#include "cuda/attention_sizes.h"

namespace herdkern::cuda {

// As mask_scores, of the transposed tile: keys from `key` on, rows of the block from `row` on.
template <int kM, int kN>
HK_DEVICE void mask_scores_transposed(const Rows& doc, const QueryBlock& block, int row, int key, int lane,
                                      float (&scores)[kM][kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int i = block.position + block.fold.query(row + 8 * n + lane % 4 * 2 + e);
      const int begin = doc.keys_begin(i) - key - lane / 4, end = doc.keys_end(i) - key - lane / 4;
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (16 * m + 8 * half < begin || 16 * m + 8 * half >= end) scores[m][n][2 * half + e] = kNegInfinity;
    }
}

// Warps that share their keys lay what each computed, left: kK blocks of 16 queries, side by side, and take all of it.
// `place`: (warps that share, kK, 32) of 16 bytes.
template <int kK>
HK_DEVICE void put_part(uint4* place, int split, int lane, const uint32_t (&left)[1][kK][4]) {
#pragma unroll
  for (int k = 0; k < kK; ++k)
    place[(split * kK + k) * kWarp + lane] = make_uint4(left[0][k][0], left[0][k][1], left[0][k][2], left[0][k][3]);
}
template <int kK>
HK_DEVICE void get_parts(const uint4* place, int lane, uint32_t (&left)[1][kK][4]) {
#pragma unroll
  for (int k = 0; k < kK; ++k) {
    const uint4 x = place[k * kWarp + lane];
    left[0][k][0] = x.x;
    left[0][k][1] = x.y;
    left[0][k][2] = x.z;
    left[0][k][3] = x.w;
  }
}

// The blocks of queries that see keys [key, key + keys), those of a document's heads one after another.
struct QueryWalk {
  int begin, step, folds, count;

  HK_DEVICE static QueryWalk of(const QueryFold& fold, const Rows& doc, int key, int keys) {
    const int begin = doc.queries_begin(key) / fold.positions * fold.positions;
    const int end = doc.queries_end(min(key + keys, doc.k_len) - 1);
    const int blocks = end > begin ? (end - begin + fold.positions - 1) / fold.positions : 0;
    return {begin, fold.positions, fold.folds, blocks * fold.folds};
  }
  HK_DEVICE QueryBlock at(const AttentionShape& shape, const QueryFold& fold, const Rows& doc, int kv_head,
                          int i) const {
    return QueryBlock::of(shape, fold, doc, begin + i / folds * step, kv_head, i % folds);
  }
};

// Begins to copy Q, dO and the two numbers of each row of a block of queries.
template <typename T, int kDim>
HK_DEVICE void copy_queries(const AttentionBackward& args, const Rows& doc, const QueryBlock& block, Shared to) {
  using Sizes = KeyGradientSizes<kDim>;
  constexpr int kTileBytes = 2 * Sizes::kRows * kDim;
  const int head_dim = static_cast<int>(args.shape.head_dim);
  copy_tile<kDim, Sizes::kRows, Sizes::kThreads>(to, head_dim, static_cast<const T*>(args.q.data),
                                                 [&](int row) { return input_row<T>(args.q, doc, block, row); });
  copy_tile<kDim, Sizes::kRows, Sizes::kThreads>(to + kTileBytes, head_dim, static_cast<const T*>(args.dout.data),
                                                 [&](int row) { return input_row<T>(args.dout, doc, block, row); });
  const int row = static_cast<int>(threadIdx.x);
  if (row >= Sizes::kRows) return;
  int query, head;
  const bool valid = block.find(row, &query, &head);
  const float* values = args.row_values + head * args.shape.total_q + doc.q_begin + block.position + query;
  const Shared place = to + 2 * kTileBytes + 4 * row;
  copy_4_bytes(place, valid ? values : args.row_values, valid);
  copy_4_bytes(place + 4 * Sizes::kRows, valid ? values + args.shape.num_heads * args.shape.total_q : args.row_values,
               valid);
}

// Writes a warp's rows of dK or dV, through the tile of its own keys.
template <typename T, int kDim, int kM, int kN>
HK_DEVICE void write_key_rows(const AttentionBackward& args, const Rows& doc, int kv_head, int key, int row, int chunk,
                              int lane, unsigned char* tile, const float (&sums)[kM][kN][4], float factor, void* out) {
  const int64_t width = args.shape.head_dim;
  put_rows<T, kDim>(tile, row, chunk, lane, sums, [&](int, int) { return factor; });
  __syncthreads();  // warps that share rows have written them
  write_rows<kDim, T>(tile, static_cast<int>(threadIdx.x) / kWarp * KeyGradientSizes<kDim>::kOwnRows,
                      KeyGradientSizes<kDim>::kOwnRows, lane, static_cast<int>(width), [&](int r) -> T* {
                        if (key + r >= doc.k_len) return nullptr;
                        return static_cast<T*>(out) +
                               ((int64_t{doc.k_begin} + key + r) * args.shape.num_kv_heads + kv_head) * width;
                      });
}

template <typename T, int kDim>
__global__ void __launch_bounds__(KeyGradientSizes<kDim>::kThreads)
    attention_key_gradient_kernel(const AttentionBackward args) {
  using Sizes = KeyGradientSizes<kDim>;
  constexpr int kM = Sizes::kRowTiles, kSplit = Sizes::kSplit, kTileBytes = 2 * Sizes::kKeys * kDim;
  static_assert(kSplit == 1 || Sizes::kStep == Sizes::kRows);  // one barrier lies between two exchanges
  constexpr int kPart = Sizes::kStep / kSplit, kColumns = kDim / 8 / kSplit;
  HK_DYNAMIC_SHARED(memory);
  const int num_kv_heads = static_cast<int>(args.shape.num_kv_heads);
  const int tile_index = static_cast<int>(blockIdx.x) / num_kv_heads;
  const int kv_head = static_cast<int>(blockIdx.x) % num_kv_heads;
  if (tile_index >= *args.key_tiles.count) return;
  const Tile tile = args.key_tiles.tiles[tile_index];
  const Rows doc = Rows::of(args.shape, args.softmax, tile.doc);
  const int key = tile.begin, head_dim = static_cast<int>(args.shape.head_dim);
  const QueryWalk walk = QueryWalk::of(args.fold, doc, key, Sizes::kKeys);

  const Shared k_tile = shared_address(memory), v_tile = k_tile + kTileBytes, slots = k_tile + Sizes::kKeyBytes;
  const auto copy_block = [&](int i, int slot) {
    if (i < walk.count)
      copy_queries<T, kDim>(args, doc, walk.at(args.shape, args.fold, doc, kv_head, i),
                            slots + slot * Sizes::kSlotBytes);
    commit_copies();
  };
  if (walk.count > 0) {
    copy_keys<kDim, Sizes::kKeys, Sizes::kThreads>(k_tile, head_dim, key_rows<T>(args.k, doc, kv_head),
                                                   args.k.token_stride, key, doc.k_len);
    copy_keys<kDim, Sizes::kKeys, Sizes::kThreads>(v_tile, head_dim, key_rows<T>(args.v, doc, kv_head),
                                                   args.v.token_stride, key, doc.k_len);
  }
  for (int i = 0; i < args.num_slots - 1; ++i) copy_block(i, i);

  int thread = static_cast<int>(threadIdx.x);
  const int key_end = min(key + Sizes::kKeys, doc.k_len);
  float dk[kM][kColumns][4], dv[kM][kColumns][4];
  set_zero(dk);
  set_zero(dv);
  for (int i = 0, slot = 0; i < walk.count; ++i, slot = after(slot, args.num_slots)) {
    wait_pending(args.num_slots - 2);
    __syncthreads();  // also: all warps are past the slot before it, which is filled now
    copy_block(i + args.num_slots - 1, before(slot, args.num_slots));
    if (args.num_slots == 1) {
      wait_copies<0>();
      __syncthreads();
    }
    const QueryBlock block = walk.at(args.shape, args.fold, doc, kv_head, i);
    const bool masked = doc.keys_begin(block.last()) > key || doc.keys_end(block.position) < key_end;
#pragma unroll 1
    for (int first = 0; first < Sizes::kRows; first += Sizes::kStep) {
      thread = not_hoisted(thread);
      const int warp = thread / kWarp, split = warp % kSplit, chunk = split * kColumns;
      const int row = warp / kSplit * 16 * kM, query_row = split * kPart;  // of the tile, of the step
      int lane = thread % kWarp;
      const Shared q_tile = slots + slot * Sizes::kSlotBytes + 2 * kDim * first;
      const Shared dout_tile = q_tile + 2 * Sizes::kRows * kDim;
      const float* values = reinterpret_cast<const float*>(memory + Sizes::kKeyBytes + slot * Sizes::kSlotBytes +
                                                           4 * Sizes::kRows * kDim) +
                            first + query_row + lane % 4 * 2;
      float scores[kM][kPart / 8][4], dp[kM][kPart / 8][4];
      score_product<T, kDim>(k_tile, row, q_tile, query_row, lane, scores);
      lane = not_hoisted(lane);
      score_product<T, kDim>(v_tile, row, dout_tile, query_row, lane, dp);
      if (args.softmax.capped) cap_scores(args.softmax.inner, scores);
      if (masked) mask_scores_transposed(doc, block, first + query_row, key + row, lane, scores);
      score_gradients(args.softmax, scores, dp, [&](int, int n, int e) {
        return make_float2(values[8 * n + e % 2], values[Sizes::kRows + 8 * n + e % 2]);
      });
      uint32_t p_own[kM][kPart / 16][4], ds_own[kM][kPart / 16][4];
      round_scores<T>(scores, p_own);
      round_scores<T>(dp, ds_own);
      lane = not_hoisted(lane);
      if constexpr (kSplit == 1) {
        sum_product<T, kDim>(p_own, dout_tile, chunk, lane, dv);
        lane = not_hoisted(lane);
        sum_product<T, kDim>(ds_own, q_tile, chunk, lane, dk);
      } else {
        constexpr int kPlace = Sizes::kStep / 16 * kWarp;  // of one operand of the warps that share their keys
        uint4* place = reinterpret_cast<uint4*>(memory + 2 * kTileBytes) + warp / kSplit * 2 * kPlace;
        uint32_t p[kM][Sizes::kStep / 16][4], ds[kM][Sizes::kStep / 16][4];
        put_part(place, split, lane, p_own);
        put_part(place + kPlace, split, lane, ds_own);
        __syncthreads();
        get_parts(place, lane, p);
        get_parts(place + kPlace, lane, ds);
        sum_product<T, kDim>(p, dout_tile, chunk, lane, dv);
        sum_product<T, kDim>(ds, q_tile, chunk, lane, dk);
      }
    }
  }

  const int warp = thread / kWarp, lane = thread % kWarp;
  const int row = warp / kSplit * 16 * kM, chunk = warp % kSplit * kColumns;
  wait_copies<0>();
  __syncthreads();  // no warp reads K and V any more: their places take dK and dV
  write_key_rows<T, kDim>(args, doc, kv_head, key, row, chunk, lane, memory, dk, args.shape.scale, args.dk);
  write_key_rows<T, kDim>(args, doc, kv_head, key, row, chunk, lane, memory + kTileBytes, dv, 1.0f, args.dv);
}

}  // namespace herdkern::cuda
