// Makes the list of tiles of common/tile_list.h on the device, in one launch of one block: nothing waits, nothing is
// allocated, and the list of a captured launch follows the borders that it finds when it is replayed.
#pragma once
#include <cstdint>

#include "common/tile_list.h"
#include "cuda/stream.h"

namespace herdkern::cuda {

// Outputs: tiles, tile_capacity(...) of them or more; count, one number; first_tiles, num_docs + 1 numbers of scratch,
// in the end the number of tiles before each document. Entries of `tiles` beyond the count are left as they were.
struct TileListMaking {
  const int32_t *cu_q, *cu_k;  // (num_docs + 1,)
  int32_t num_docs;
  int64_t capacity;  // bounds the number of threads alone
  Window window;
  TileCut cut;
  Tile* tiles;
  int32_t *count, *first_tiles;
};

void launch_tile_list(const TileListMaking& args, cudaStream_t stream);

}  // namespace herdkern::cuda
