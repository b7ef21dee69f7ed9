#include "cuda/element.cuh"
#include "cuda/rms_norm_kernel.cuh"

namespace herdkern::cuda {
namespace {

// Packs that a thread holds of a row of so many; 0: the row is read twice, as long ones and those of single elements
// are.
int packs_of_thread(int64_t packs_of_row, bool wide) {
  if (packs_of_row <= kShortRowThreads) return 1;
  return wide && packs_of_row <= 2 * kMaxRowThreads ? 2 : 0;
}

// The block's threads: a power of two for a row, and several rows of up to a warp.
dim3 block_of(int64_t packs_of_row, int packs) {
  const int64_t threads = packs == 0 ? kMaxRowThreads : ceil_div(packs_of_row, packs);
  dim3 block(1, 1);
  while (static_cast<int64_t>(block.x) < threads) block.x *= 2;
  if (block.x <= kWarp) block.y = kShortRowThreads / block.x;
  return block;
}

template <typename T, int N>
void forward(const RmsNormForward& a, cudaStream_t stream) {
  const int64_t packs_of_row = ceil_div(a.shape.dim, N);
  const int packs = packs_of_thread(packs_of_row, N > 1);
  const dim3 block = block_of(packs_of_row, packs);
  const dim3 grid(grid_size("rms_norm", ceil_div(a.shape.num_rows, block.y)));
  if (packs == 1) return HK_LAUNCH((rms_norm_forward_kernel<T, N, 1>), grid, block, 0, stream, a);
  if constexpr (N > 1)
    if (packs == 2) return HK_LAUNCH((rms_norm_forward_kernel<T, N, 2>), grid, block, 0, stream, a);
  HK_LAUNCH((rms_norm_forward_kernel<T, N, 0>), grid, block, 0, stream, a);
}

template <typename T>
void sum_runs(const RmsNormBackward& a, cudaStream_t stream) {
  const dim3 grid(grid_size("rms_norm", ceil_div(a.shape.dim, kWarp))), block(kWarp, kTileRows);
  const int64_t num_sums = ceil_div(a.shape.num_rows, a.rows_per_sum);
  if (a.shape.weight_element == Element::kFloat32)
    HK_LAUNCH(rms_norm_sum_runs_kernel<float>, grid, block, 0, stream, a.sums, num_sums, a.shape.dim,
              static_cast<float*>(a.dweight));
  else
    HK_LAUNCH(rms_norm_sum_runs_kernel<T>, grid, block, 0, stream, a.sums, num_sums, a.shape.dim,
              static_cast<T*>(a.dweight));
}

template <typename T, int N>
void dx_alone(const RmsNormBackward& a, int64_t packs_of_row, cudaStream_t stream) {
  const int packs = packs_of_thread(packs_of_row, N > 1);
  const dim3 block = block_of(packs_of_row, packs);
  const dim3 grid(grid_size("rms_norm", ceil_div(a.shape.num_rows, block.y)));
  if (packs == 1) return HK_LAUNCH((rms_norm_dx_kernel<T, N, 1>), grid, block, 0, stream, a);
  if constexpr (N > 1)
    if (packs == 2) return HK_LAUNCH((rms_norm_dx_kernel<T, N, 2>), grid, block, 0, stream, a);
  HK_LAUNCH((rms_norm_dx_kernel<T, N, 0>), grid, block, 0, stream, a);
}

// Both gradients from one reading, if a row and its sums fit into the registers of a block.
template <typename T, int N>
bool fused(const RmsNormBackward& a, int64_t packs_of_row, dim3 grid, cudaStream_t stream) {
  if (packs_of_row <= kShortRowThreads) {
    HK_LAUNCH((rms_norm_fused_backward_kernel<T, N, 1>), grid, block_of(packs_of_row, 1), 0, stream, a);
    return true;
  }
  if constexpr (N > 1) {
    if (packs_of_row <= 2 * kFusedThreads) {
      HK_LAUNCH((rms_norm_fused_backward_kernel<T, N, 2>), grid, block_of(packs_of_row, 2), 0, stream, a);
      return true;
    }
  }
  return false;
}

template <typename T, int N>
void backward(const RmsNormBackward& a, cudaStream_t stream) {
  const int64_t packs_of_row = ceil_div(a.shape.dim, N);
  if (a.dweight == nullptr) {
    if (a.dx != nullptr) dx_alone<T, N>(a, packs_of_row, stream);
    return;
  }
  const unsigned num_sums = grid_size("rms_norm", ceil_div(a.shape.num_rows, a.rows_per_sum));
  if (a.dx == nullptr || !fused<T, N>(a, packs_of_row, dim3(num_sums), stream)) {
    if (a.dx != nullptr) dx_alone<T, N>(a, packs_of_row, stream);
    const dim3 grid(grid_size("rms_norm", ceil_div(packs_of_row, kWarp)), num_sums), block(kWarp, kTileRows);
    HK_LAUNCH((rms_norm_dweight_kernel<T, N>), grid, block, 0, stream, a);
  }
  sum_runs<T>(a, stream);
}

template <typename T>
void forward_of(const RmsNormForward& a, cudaStream_t stream) {
  constexpr int64_t kSize = sizeof(T);
  const bool wide = is_aligned({a.x, a.residual, a.weight, a.out, a.new_residual},
                               {a.shape.dim * kSize, a.x_stride * kSize, a.residual_stride * kSize});
  wide ? forward<T, 16 / kSize>(a, stream) : forward<T, 1>(a, stream);
}

template <typename T>
void backward_of(const RmsNormBackward& a, cudaStream_t stream) {
  constexpr int64_t kSize = sizeof(T);
  const bool wide =
      is_aligned({a.dout, a.dresidual, a.x, a.weight, a.dx},
                 {a.shape.dim * kSize, a.dout_stride * kSize, a.dresidual_stride * kSize, a.x_stride * kSize});
  wide ? backward<T, 16 / kSize>(a, stream) : backward<T, 1>(a, stream);
}

}  // namespace

void launch_rms_norm_forward(const RmsNormForward& a, cudaStream_t stream) {
  if (a.shape.num_rows == 0) return;
  with_element(a.shape.element, [&](auto zero) { forward_of<decltype(zero)>(a, stream); });
}

void launch_rms_norm_backward(const RmsNormBackward& a, cudaStream_t stream) {
  if (a.shape.dim == 0) return;
  with_element(a.shape.element, [&](auto zero) {
    if (a.shape.num_rows > 0) return backward_of<decltype(zero)>(a, stream);
    if (a.dweight != nullptr) sum_runs<decltype(zero)>(a, stream);  // of no rows: zeros
  });
}

}  // namespace herdkern::cuda
