#include "cuda/rms_norm_kernel.cuh"

namespace herdkern::cuda {
namespace {

constexpr int kBlockThreads = 256;

// How a row is spread: packs of a thread (0: more than the registers hold) and the block's threads.
struct Spread {
  int packs;
  dim3 block;
  explicit Spread(int64_t packs_of_row) : packs(1), block(1, 1) {
    if (packs_of_row > kBlockThreads) packs = 2;
    while (packs < 8 && packs_of_row > int64_t{packs} * kMaxRowThreads) packs *= 2;
    if (packs_of_row > int64_t{packs} * kMaxRowThreads) packs = 0;
    const int64_t threads = packs == 0 ? kMaxRowThreads : ceil_div(packs_of_row, packs);
    while (static_cast<int64_t>(block.x) < threads) block.x *= 2;
    if (block.x < kBlockThreads) block.y = block.x <= kWarp ? kBlockThreads / block.x : 1;
  }
};

template <typename T, int N>
void forward(const RmsNormForward& a, cudaStream_t stream) {
  const Spread spread(ceil_div(a.shape.dim, N));
  const dim3 grid(grid_size("rms_norm", ceil_div(a.shape.num_rows, spread.block.y)));
  switch (spread.packs) {
    case 1:
      return HK_LAUNCH((rms_norm_forward_kernel<T, N, 1>), grid, spread.block, 0, stream, a);
    case 2:
      return HK_LAUNCH((rms_norm_forward_kernel<T, N, 2>), grid, spread.block, 0, stream, a);
    case 4:
      return HK_LAUNCH((rms_norm_forward_kernel<T, N, 4>), grid, spread.block, 0, stream, a);
    case 8:
      return HK_LAUNCH((rms_norm_forward_kernel<T, N, 8>), grid, spread.block, 0, stream, a);
    default:
      return HK_LAUNCH((rms_norm_forward_kernel<T, N, 0>), grid, spread.block, 0, stream, a);
  }
}

template <typename T>
void forward_of(const RmsNormForward& a, cudaStream_t stream) {
  constexpr int64_t kSize = sizeof(T);
  const bool wide = is_aligned({a.x, a.residual, a.weight, a.out, a.new_residual},
                               {a.shape.dim * kSize, a.x_stride * kSize, a.residual_stride * kSize});
  wide ? forward<T, 16 / kSize>(a, stream) : forward<T, 1>(a, stream);
}

}  // namespace

void launch_rms_norm_forward(const RmsNormForward& a, cudaStream_t stream) {
  if (a.shape.num_rows == 0) return;
  switch (a.shape.element) {
    case Element::kFloat32:
      return forward_of<float>(a, stream);
    case Element::kBfloat16:
      return forward_of<bf16>(a, stream);
    case Element::kFloat16:
      return forward_of<fp16>(a, stream);
  }
}

}  // namespace herdkern::cuda
