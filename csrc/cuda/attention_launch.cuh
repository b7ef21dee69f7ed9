// The launchers of one padded head_dim, and how many slots of shared memory a launch asks for.
#pragma once
#include <algorithm>

#include "cuda/attention_forward_kernel.cuh"
#include "cuda/attention_key_gradient_kernel.cuh"
#include "cuda/attention_query_gradient_kernel.cuh"

namespace herdkern::cuda {

struct SharedLimits {
  int block, multiprocessor;  // bytes
};
inline SharedLimits shared_limits() {
#ifdef HK_SIMT
  return {99 * 1024, 100 * 1024};  // the smallest device served
#else
  SharedLimits limits{};
  int device = 0;
  check("attention", cudaGetDevice(&device));
  check("attention", cudaDeviceGetAttribute(&limits.block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check("attention",
        cudaDeviceGetAttribute(&limits.multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  return limits;
#endif
}

// As many slots as leave room for as many blocks on a multiprocessor as registers allow (256 threads of 255).
template <typename Sizes>
int choose_slots(const SharedLimits& limits, int fixed_bytes) {
  int best = Sizes::kMinSlots, most = 0;
  for (int slots = Sizes::kMinSlots; slots <= Sizes::kMaxSlots; ++slots) {
    const int bytes = fixed_bytes + slots * Sizes::kSlotBytes;
    if (bytes > limits.block) break;
    const int blocks = std::min(limits.multiprocessor / (bytes + 1024), 256 / Sizes::kThreads);
    if (blocks < most) break;
    best = slots;
    most = blocks;
  }
  return best;
}

inline dim3 grid_of(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

template <typename T, int kDim>
void launch_forward(AttentionForward args, cudaStream_t stream) {
  using Sizes = ForwardSizes<kDim>;
  args.num_slots = choose_slots<Sizes>(shared_limits(), Sizes::kQueryBytes);
  const int64_t blocks = args.tiles.capacity * args.shape.num_kv_heads * args.fold.folds;
  HK_LAUNCH((attention_forward_kernel<T, kDim>), grid_of(blocks), dim3(Sizes::kThreads),
            Sizes::kQueryBytes + args.num_slots * Sizes::kSlotBytes, stream, args);
}

template <typename T, int kDim>
void launch_query_gradient(AttentionBackward args, cudaStream_t stream) {
  using Sizes = QueryGradientSizes<kDim>;
  args.fold = QueryFold::of(args.shape.group(), Sizes::kRows);
  args.num_slots = choose_slots<Sizes>(shared_limits(), Sizes::kQueryBytes);
  const int64_t blocks = args.query_tiles.capacity * args.shape.num_kv_heads * args.fold.folds;
  HK_LAUNCH((attention_query_gradient_kernel<T, kDim>), grid_of(blocks), dim3(Sizes::kThreads),
            Sizes::kQueryBytes + args.num_slots * Sizes::kSlotBytes, stream, args);
}

template <typename T, int kDim>
void launch_key_gradient(AttentionBackward args, cudaStream_t stream) {
  using Sizes = KeyGradientSizes<kDim>;
  args.fold = QueryFold::of(args.shape.group(), Sizes::kRows);
  args.num_slots = choose_slots<Sizes>(shared_limits(), Sizes::kKeyBytes);
  const int64_t blocks = args.key_tiles.capacity * args.shape.num_kv_heads;
  HK_LAUNCH((attention_key_gradient_kernel<T, kDim>), grid_of(blocks), dim3(Sizes::kThreads),
            Sizes::kKeyBytes + args.num_slots * Sizes::kSlotBytes, stream, args);
}

// All three of both storage types: the content of attention_<kDim>.cu.
#define HK_ATTENTION_OF_HEAD_DIM(kDim)                                              \
  template void launch_forward<bf16, kDim>(AttentionForward, cudaStream_t);         \
  template void launch_forward<fp16, kDim>(AttentionForward, cudaStream_t);         \
  template void launch_query_gradient<bf16, kDim>(AttentionBackward, cudaStream_t); \
  template void launch_query_gradient<fp16, kDim>(AttentionBackward, cudaStream_t); \
  template void launch_key_gradient<bf16, kDim>(AttentionBackward, cudaStream_t);   \
  template void launch_key_gradient<fp16, kDim>(AttentionBackward, cudaStream_t)

}  // namespace herdkern::cuda
