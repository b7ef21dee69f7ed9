// The kernel of tile_list.h: one block. Tiles before each document by a scan; then a counting sort by falling work in
// which each warp owns a run of tiles and ranks 32 at a time, so that equal work keeps its order and every run gives
// the same list. Each tile's work is computed twice and stored nowhere.
#pragma once
#include "cuda/device.cuh"
#include "cuda/tile_list.h"

namespace herdkern::cuda {

constexpr int kTileListThreads = 1024;
constexpr int kTileListWarps = kTileListThreads / kWarp;

// Sum of x over the threads before this one; `total`: over all. `scratch`: a number for each warp. All threads call it.
HK_DEVICE int sum_before(int x, int* scratch, int& total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int num_warps = static_cast<int>(blockDim.x) / kWarp;
  int sum = x;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane >= offset) sum += other;
  }
  __syncthreads();  // what the last call left has been read
  if (lane == kWarp - 1) scratch[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int i = 0; i < num_warps; ++i) {
    if (i == warp) before = total;
    total += scratch[i];
  }
  return before + sum - x;
}

// Tile `index` of all, counted document by document. `doc` is a document at or before it, and becomes its own.
HK_DEVICE Tile tile_at(const TileListMaking& a, int index, int& doc) {
  if (index >= a.first_tiles[doc + 1]) {
    int low = doc + 1, high = a.num_docs;  // first_tiles[low] <= index < first_tiles[high]
    while (high - low > 1) {
      const int middle = low + (high - low) / 2;
      (a.first_tiles[middle] <= index ? low : high) = middle;
    }
    doc = low;
  }
  return {doc, (index - a.first_tiles[doc]) * a.cut.size};
}

__global__ void __launch_bounds__(kTileListThreads) tile_list_kernel(const TileListMaking a) {
  // Tiles of each rank, the highest first, and of each warp; then where the next of them goes.
  __shared__ int places[kWorkRanks * kTileListWarps];
  __shared__ int scratch[kTileListWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int num_threads = static_cast<int>(blockDim.x), num_warps = num_threads / kWarp;

  int count = 0;
  for (int first = 0; first < a.num_docs; first += num_threads) {
    const int doc = first + thread;
    const int tiles =
        doc < a.num_docs ? static_cast<int>(num_tiles(document_at(a.cu_q, a.cu_k, doc, a.window), a.cut)) : 0;
    int total;
    const int before = sum_before(tiles, scratch, total);
    if (doc < a.num_docs) a.first_tiles[doc] = count + before;
    count += total;
  }
  if (thread == 0) *a.count = a.first_tiles[a.num_docs] = count;
  for (int i = thread; i < kWorkRanks * num_warps; i += num_threads) places[i] = 0;
  __syncthreads();

  const int run = (count + num_threads - 1) / num_threads * kWarp;  // tiles of a warp
  const int begin = warp * run, end = count - begin < run ? count : begin + run;
  // Calls at(tile, place, peers, is_first) for each tile of this warp's, 32 at a time; peers: those of equal work.
  const auto for_tiles = [&](const auto& at) {
    int doc = 0;
    for (int first = begin; first < end; first += kWarp) {
      const bool is_tile = first + lane < end;
      Tile tile{0, 0};
      int rank = -1;
      if (is_tile) {
        tile = tile_at(a, first + lane, doc);
        rank = work_rank(work_of(document_at(a.cu_q, a.cu_k, tile.doc, a.window), a.cut, tile.begin));
      }
      const unsigned peers = __match_any_sync(kAllLanes, rank), lower = peers & ((1u << lane) - 1);
      int* place = places + (is_tile ? kWorkRanks - 1 - rank : 0) * num_warps + warp;
      if (is_tile) at(tile, *place + __popc(lower));
      __syncwarp();
      if (is_tile && lower == 0) *place += __popc(peers);
      __syncwarp();
    }
  };
  for_tiles([](Tile, int) {});
  __syncthreads();

  int held[kWorkRanks / kWarp], sum = 0;  // neighbouring entries of a thread
#pragma unroll
  for (int i = 0; i < kWorkRanks / kWarp; ++i) {
    held[i] = sum;
    sum += places[thread * (kWorkRanks / kWarp) + i];
  }
  int total;
  const int before = sum_before(sum, scratch, total);
#pragma unroll
  for (int i = 0; i < kWorkRanks / kWarp; ++i) places[thread * (kWorkRanks / kWarp) + i] = before + held[i];
  __syncthreads();
  for_tiles([&](Tile tile, int place) { a.tiles[place] = tile; });
}

}  // namespace herdkern::cuda
