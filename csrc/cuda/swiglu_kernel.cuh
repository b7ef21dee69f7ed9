// The kernels of swiglu.h: one pass, a thread for each pack of N elements.
#pragma once
#include "cuda/device.cuh"
#include "cuda/swiglu.h"

namespace herdkern::cuda {

constexpr int kSwigluThreads = 256;

// Where a thread works: blocks_of_row blocks share a row, or a block holds blockDim.y rows.
struct SwigluPlace {
  int64_t row, c;
  bool inside;
  HK_DEVICE SwigluPlace(int64_t num_rows, int64_t dim, unsigned blocks_of_row, int pack) {
    row = int64_t{blockIdx.x / blocks_of_row} * blockDim.y + threadIdx.y;
    c = (int64_t{blockIdx.x % blocks_of_row} * blockDim.x + threadIdx.x) * pack;
    inside = row < num_rows && c < dim;
  }
};

// 1 / (1 + e^-x), to about 3 units in the last place; 0 below -88.
HK_DEVICE float sigmoid(float x) { return divide_approx(1.0f, 1.0f + exp2_approx(x * -1.44269504088896341f)); }

template <typename T, int N>
__global__ void __launch_bounds__(kSwigluThreads)
    swiglu_forward_kernel(const SwigluForward a, const unsigned blocks_of_row) {
  const SwigluPlace at(a.num_rows, a.dim, blocks_of_row, N);
  if (!at.inside) return;
  const auto gate = load<N>(static_cast<const T*>(a.gate) + at.row * a.gate_stride + at.c);
  const auto up = load<N>(static_cast<const T*>(a.up) + at.row * a.up_stride + at.c);
  Pack<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out.set(i, gate[i] * sigmoid(gate[i]) * up[i]);
  store(static_cast<T*>(a.out) + at.row * a.dim + at.c, out);
}

// silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g).
template <typename T, int N>
__global__ void __launch_bounds__(kSwigluThreads)
    swiglu_backward_kernel(const SwigluBackward a, const unsigned blocks_of_row) {
  const SwigluPlace at(a.num_rows, a.dim, blocks_of_row, N);
  if (!at.inside) return;
  const auto dout = load<N>(static_cast<const T*>(a.dout) + at.row * a.dout_stride + at.c);
  const auto gate = load<N>(static_cast<const T*>(a.gate) + at.row * a.gate_stride + at.c);
  Pack<T, N> up{}, dgate, dup;
  if (a.dgate != nullptr) up = load<N>(static_cast<const T*>(a.up) + at.row * a.up_stride + at.c);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float s = sigmoid(gate[i]), d = dout[i] * s;
    dgate.set(i, d * up[i] * (1.0f + gate[i] * (1.0f - s)));
    dup.set(i, d * gate[i]);
  }
  if (a.dgate != nullptr) store(static_cast<T*>(a.dgate) + at.row * a.grad_stride + at.c, dgate);
  if (a.dup != nullptr) store(static_cast<T*>(a.dup) + at.row * a.grad_stride + at.c, dup);
}

}  // namespace herdkern::cuda
