// The kernels of rms_norm.h. A group of threads (a power of two) holds one row in registers, so that x is read once and
// written once; short rows share a block: threadIdx.x is the place in the row's group, threadIdx.y the row.
#pragma once
#include "cuda/device.cuh"
#include "cuda/rms_norm.h"

namespace herdkern::cuda {

constexpr int kMaxRowThreads = 1024;

// The sum over the threads of a row, the same bits in each. `scratch`: 32 floats of shared memory for each row of the
// block (unused in groups of at most a warp); every thread of the block calls it, and may call it again at once.
HK_DEVICE float row_sum(float x, float* scratch) {
  const int width = static_cast<int>(blockDim.x);
  x = warp_sum(x, width < kWarp ? width : kWarp);
  if (width <= kWarp) return x;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  __syncthreads();  // what the last call left has been read
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_sum(lane < width / kWarp ? scratch[lane] : 0.0f);
}

// N elements of the weight from column c on, as fp32.
template <typename T, int N>
struct WeightPack {
  float w[N];
  HK_DEVICE WeightPack(const void* weight, Element element, int64_t c) {
    if (element == Element::kFloat32) {
      constexpr int kPart = N > 4 ? 4 : N;
#pragma unroll
      for (int part = 0; part < N / kPart; ++part) {
        const auto pack = load<kPart>(static_cast<const float*>(weight) + c + part * kPart);
#pragma unroll
        for (int i = 0; i < kPart; ++i) w[part * kPart + i] = pack[i];
      }
    } else {
      const auto pack = load<N>(static_cast<const T*>(weight) + c);
#pragma unroll
      for (int i = 0; i < N; ++i) w[i] = pack[i];
    }
  }
};

// weight + weight_offset as `casting` rounds it.
template <typename T>
HK_DEVICE float shifted(float weight, float offset, Casting casting) {
  if (offset == 0.0f) return weight;
  return casting == Casting::kNone ? rounded_to<T>(add(rounded_to<T>(weight), offset)) : add(weight, offset);
}

template <typename T>
HK_DEVICE float rstd_of(float sum_of_squares, const RmsNormForward& a) {
  const float mean = sum_of_squares / static_cast<float>(a.shape.dim);
  if (a.shape.casting != Casting::kNone) return 1.0f / sqrtf(add(mean, a.eps));
  return rounded_to<T>(1.0f / sqrtf(rounded_to<T>(add(rounded_to<T>(mean), a.eps))));
}

// K packs of N elements a thread; K = 0: rows longer than the registers hold, which are read a second time.
template <typename T, int N, int K>
__global__ void __launch_bounds__(kMaxRowThreads) rms_norm_forward_kernel(const RmsNormForward a) {
  __shared__ float scratch[kWarp];  // rows of more than a warp have a block of their own
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, dim = a.shape.dim;
  const int64_t begin = int64_t{threadIdx.x} * N, step = int64_t{blockDim.x} * N;
  const int64_t end = row < a.shape.num_rows ? dim : 0;
  const Casting casting = a.shape.casting;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
  T *out = static_cast<T*>(a.out) + row * dim, *total = static_cast<T*>(a.new_residual) + row * dim;

  const auto hidden_at = [&](int64_t c) {  // what is normed is what is stored
    Pack<T, N> hidden = load<N>(x + c);
    if (a.residual != nullptr) {
      const auto other = load<N>(residual + c);
#pragma unroll
      for (int i = 0; i < N; ++i) hidden.set(i, hidden[i] + other[i]);
    }
    return hidden;
  };
  const auto squares = [&](const Pack<T, N>& hidden) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float square = hidden[i] * hidden[i];
      sum += casting == Casting::kNone ? rounded_to<T>(square) : square;
    }
    return sum;
  };
  const auto write = [&](int64_t c, Pack<T, N> hidden, float rstd) {
    const WeightPack<T, N> weight(a.weight, a.shape.weight_element, c);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float normed = mul(hidden[i], rstd);
      if (casting != Casting::kGemma) normed = rounded_to<T>(normed);
      hidden.set(i, mul(normed, shifted<T>(weight.w[i], a.shape.weight_offset, casting)));
    }
    store(out + c, hidden);
  };

  float sum = 0.0f;
  if constexpr (K > 0) {
    Pack<T, N> held[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (begin + k * step >= end) continue;
      held[k] = hidden_at(begin + k * step);
      sum += squares(held[k]);
    }
    const float rstd = rstd_of<T>(row_sum(sum, scratch), a);
    if (threadIdx.x == 0 && row < a.shape.num_rows) a.rstd[row] = rstd;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t c = begin + k * step;
      if (c >= end) continue;
      if (a.residual != nullptr) store(total + c, held[k]);
      write(c, held[k], rstd);
    }
  } else {
    for (int64_t c = begin; c < end; c += step) {
      const auto hidden = hidden_at(c);
      if (a.residual != nullptr) store(total + c, hidden);
      sum += squares(hidden);
    }
    const float rstd = rstd_of<T>(row_sum(sum, scratch), a);
    if (threadIdx.x == 0 && row < a.shape.num_rows) a.rstd[row] = rstd;
    for (int64_t c = begin; c < end; c += step) write(c, hidden_at(c), rstd);
  }
}

}  // namespace herdkern::cuda
