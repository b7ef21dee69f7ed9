#include "cuda/element.cuh"
#include "cuda/swiglu_kernel.cuh"

namespace herdkern::cuda {
namespace {

// How rows of so many packs are spread over blocks.
struct SwigluSpread {
  unsigned blocks_of_row;
  dim3 block, grid;
  SwigluSpread(int64_t num_rows, int64_t packs_of_row) : block(1, 1) {
    while (block.x < kSwigluThreads && static_cast<int64_t>(block.x) < packs_of_row) block.x *= 2;
    block.y = kSwigluThreads / block.x;
    const int64_t blocks = ceil_div(packs_of_row, block.x);
    grid = dim3(grid_size("swiglu", ceil_div(num_rows, block.y) * blocks));
    blocks_of_row = static_cast<unsigned>(blocks);
  }
};

// Rows that follow each other without a gap are one.
void join_rows(int64_t& num_rows, int64_t& dim, std::initializer_list<int64_t> strides) {
  for (const int64_t stride : strides)
    if (stride != dim) return;
  dim *= num_rows;
  num_rows = 1;
}

template <typename T, int N>
void forward(const SwigluForward& a, cudaStream_t stream) {
  const SwigluSpread spread(a.num_rows, ceil_div(a.dim, N));
  HK_LAUNCH((swiglu_forward_kernel<T, N>), spread.grid, spread.block, 0, stream, a, spread.blocks_of_row);
}

template <typename T, int N>
void backward(const SwigluBackward& a, cudaStream_t stream) {
  const SwigluSpread spread(a.num_rows, ceil_div(a.dim, N));
  HK_LAUNCH((swiglu_backward_kernel<T, N>), spread.grid, spread.block, 0, stream, a, spread.blocks_of_row);
}

}  // namespace

void launch_swiglu_forward(const SwigluForward& args, cudaStream_t stream) {
  if (args.num_rows == 0 || args.dim == 0) return;
  SwigluForward a = args;
  join_rows(a.num_rows, a.dim, {a.gate_stride, a.up_stride});
  with_element(a.element, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t kSize = sizeof(T);
    // one row has no next one, and its stride means nothing
    const int64_t one = a.num_rows > 1 ? kSize : 0;
    const bool wide = is_aligned({a.gate, a.up, a.out}, {a.gate_stride * one, a.up_stride * one, a.dim * one});
    wide&& a.dim % (16 / kSize) == 0 ? forward<T, 16 / kSize>(a, stream) : forward<T, 1>(a, stream);
  });
}

void launch_swiglu_backward(const SwigluBackward& args, cudaStream_t stream) {
  if (args.num_rows == 0 || args.dim == 0) return;
  SwigluBackward a = args;
  join_rows(a.num_rows, a.dim, {a.dout_stride, a.gate_stride, a.up_stride, a.grad_stride});
  with_element(a.element, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t kSize = sizeof(T);
    const int64_t one = a.num_rows > 1 ? kSize : 0;
    const bool wide = is_aligned({a.dout, a.gate, a.up, a.dgate, a.dup},
                                 {a.dout_stride * one, a.gate_stride * one, a.up_stride * one, a.grad_stride * one});
    wide&& a.dim % (16 / kSize) == 0 ? backward<T, 16 / kSize>(a, stream) : backward<T, 1>(a, stream);
  });
}

}  // namespace herdkern::cuda
