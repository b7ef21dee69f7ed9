#include "cuda/elementwise.h"
#include "cuda/paged_attention_kernel.cuh"
#include "cuda/tile_list.h"

namespace herdkern::cuda {
namespace {

// The workspace: tiles, then their count and the tiles before each document, then partial results.
struct Workspace {
  int64_t max_splits, capacity, tile_bytes, count_bytes, partial_bytes;

  Workspace(int64_t total_q, int64_t num_docs, int64_t num_heads, int64_t head_dim, int64_t max_keys)
      : max_splits(ceil_div(max_keys, kSplitKeys)),
        capacity(num_docs * max_splits),
        tile_bytes(round_up(capacity * int64_t{sizeof(Tile)}, 256)),
        count_bytes(round_up((num_docs + 2) * int64_t{sizeof(int32_t)}, 256)),
        partial_bytes(max_splits > 1 ? total_q * max_splits * num_heads * (head_dim + 2) * int64_t{sizeof(float)} : 0) {
  }
};

template <typename T, int kLanes, int kRows>
void run(const PagedAttention& a, const PagedSplits& splits, int64_t capacity, cudaStream_t stream) {
  // Enough blocks for the largest device; each goes through the items that fall to it.
  const int64_t items = capacity * a.num_kv_heads, most = 2048;
  const dim3 grid(static_cast<unsigned>(items < most ? items : most));
  HK_LAUNCH((paged_attention_kernel<T, kLanes, kRows>), grid, dim3(kPagedThreads), 0, stream, a, splits);
}

template <typename T, int kLanes>
void run_rows(const PagedAttention& a, const PagedSplits& splits, int64_t capacity, cudaStream_t stream) {
  const int64_t group = a.num_heads / a.num_kv_heads;
  if (group == 1) return run<T, kLanes, 1>(a, splits, capacity, stream);
  if (group <= 4) return run<T, kLanes, 4>(a, splits, capacity, stream);
  run<T, kLanes, 8>(a, splits, capacity, stream);
}

template <typename T>
void run_type(const PagedAttention& a, const PagedSplits& splits, int64_t capacity, cudaStream_t stream) {
  if (capacity > 0) {
    if (a.head_dim <= 64) {
      run_rows<T, 8>(a, splits, capacity, stream);
    } else if (a.head_dim <= 128) {
      run_rows<T, 16>(a, splits, capacity, stream);
    } else {
      run_rows<T, 32>(a, splits, capacity, stream);
    }
  }
  const dim3 grid(grid_size("paged_attention", ceil_div(a.total_q * a.num_heads, kPagedWarps)));
  HK_LAUNCH((join_splits_kernel<T>), grid, dim3(kPagedThreads), 0, stream, a, splits.partials);
}

}  // namespace

int64_t paged_attention_workspace_bytes(int64_t total_q, int64_t num_docs, int64_t num_heads, int64_t head_dim,
                                        int64_t max_keys) {
  const Workspace w(total_q, num_docs, num_heads, head_dim, max_keys);
  return w.tile_bytes + w.count_bytes + w.partial_bytes;
}

void launch_paged_attention(const PagedAttention& a, void* workspace, cudaStream_t stream) {
  if (a.total_q == 0 || a.num_heads == 0 || a.num_docs == 0) return;
  const Workspace w(a.total_q, a.num_docs, a.num_heads, a.head_dim, a.max_keys);
  auto* bytes = static_cast<unsigned char*>(workspace);
  auto* tiles = reinterpret_cast<Tile*>(bytes);
  auto* count = reinterpret_cast<int32_t*>(bytes + w.tile_bytes);
  const PagedSplits splits{
      tiles, count, {reinterpret_cast<float*>(bytes + w.tile_bytes + w.count_bytes), w.max_splits}};
  if (w.capacity > 0)
    launch_tile_list({a.cu_q, a.cu_k, a.num_docs, w.capacity, a.window, {kSplitKeys, 1, true}, tiles, count, count + 1},
                     stream);
  a.is_bfloat16 ? run_type<bf16>(a, splits, w.capacity, stream) : run_type<fp16>(a, splits, w.capacity, stream);
}

}  // namespace herdkern::cuda
