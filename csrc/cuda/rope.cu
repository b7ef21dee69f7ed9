#include <algorithm>

#include "cuda/element.cuh"
#include "cuda/rope_kernel.cuh"

namespace herdkern::cuda {
namespace {

bool has_wide_heads(const RopeHeads& heads, int64_t size) {
  if (heads.num_heads == 0) return true;
  const int64_t of_head = heads.num_heads > 1 ? size : 0;  // one head has no next one
  return is_aligned({heads.x, heads.out}, {heads.x_stride * size, heads.x_head_stride * of_head,
                                           heads.out_stride * size, heads.out_head_stride * of_head});
}

template <typename T, int P, bool kInterleaved>
void turn(const Rope& a, cudaStream_t stream) {
  const int64_t packs = ceil_div(a.head_dim / 2, P), groups = ceil_div(a.q.num_heads + a.k.num_heads, kRopeHeads);
  dim3 block;
  block.x = static_cast<unsigned>(std::min<int64_t>(packs, kRopeThreads));
  block.y = static_cast<unsigned>(std::min<int64_t>(groups, kRopeThreads / block.x));
  block.z = std::min(64u, kRopeThreads / (block.x * block.y));  // 64: the most that CUDA allows
  const dim3 grid(grid_size("rope", ceil_div(a.num_tokens, block.z)));
  HK_LAUNCH((rope_kernel<T, P, kInterleaved>), grid, block, 0, stream, a);
}

}  // namespace

void launch_rope(const Rope& a, cudaStream_t stream) {
  if (a.num_tokens == 0 || a.head_dim == 0 || a.q.num_heads + a.k.num_heads == 0) return;
  with_element(a.element, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kPack = 16 / sizeof(T);
    const int64_t half = a.head_dim / 2;
    const bool wide =
        has_wide_heads(a.q, sizeof(T)) && has_wide_heads(a.k, sizeof(T)) && is_aligned({a.cos, a.sin}, {});
    if (a.interleaved)
      return wide && half % (kPack / 2) == 0 ? turn<T, kPack / 2, true>(a, stream) : turn<T, 1, true>(a, stream);
    wide&& half % kPack == 0 ? turn<T, kPack, false>(a, stream) : turn<T, 1, false>(a, stream);
  });
}

}  // namespace herdkern::cuda
