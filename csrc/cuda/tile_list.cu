#include "cuda/tile_list_kernel.cuh"

namespace herdkern::cuda {

void launch_tile_list(const TileListMaking& a, cudaStream_t stream) {
  const int64_t most = a.capacity > a.num_docs ? a.capacity : a.num_docs;
  unsigned threads = 128;
  while (threads < kTileListThreads && int64_t{threads} * 2 < most) threads *= 2;
  HK_LAUNCH(tile_list_kernel, dim3(1), dim3(threads), 0, stream, a);
}

}  // namespace herdkern::cuda
