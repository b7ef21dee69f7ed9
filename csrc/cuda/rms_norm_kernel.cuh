// The kernels of rms_norm.h. A group of threads (a power of two) holds one row in registers, so that x is read once and
// written once; short rows share a block: threadIdx.x is the place in the row's group, threadIdx.y the row.
#pragma once
#include "cuda/device.cuh"
#include "cuda/rms_norm.h"

namespace herdkern::cuda {

constexpr int kShortRowThreads = 256, kMaxRowThreads = 1024;

// The most threads of a block whose threads hold K packs: one pack is for short rows.
HK_HOST_DEVICE constexpr int row_threads(int packs) { return packs == 1 ? kShortRowThreads : kMaxRowThreads; }

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

// K packs of N elements a thread; K = 0: rows longer than the registers hold, which are read a second time (for them
// ptxas aims at two blocks of 1024 threads, and spills four bytes on sm_100a, unless one is said to be enough).
template <typename T, int N, int K>
__global__ void __launch_bounds__(row_threads(K), K == 0 ? 1 : 0) rms_norm_forward_kernel(const RmsNormForward a) {
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

// What both gradients of one element take part in: xhat as the weight was multiplied by it, dout.
template <typename T, int N>
struct BackwardPack {
  Pack<T, N> x{}, dout{};
  HK_DEVICE void load_from(const RmsNormBackward& a, int64_t row, int64_t c) {
    x = load<N>(static_cast<const T*>(a.x) + row * a.x_stride + c);
    dout = load<N>(static_cast<const T*>(a.dout) + row * a.dout_stride + c);
  }
  HK_DEVICE float xhat(int i, float rstd, Casting casting) const {
    const float value = x[i] * rstd;
    return casting == Casting::kNone ? rounded_to<T>(value) : value;
  }
};

// sum(dxhat * xhat) over a pack, with dxhat = dout * (weight + weight_offset).
template <typename T, int N>
HK_DEVICE float pull_of(const RmsNormBackward& a, const BackwardPack<T, N>& pack, float rstd, int64_t c) {
  const WeightPack<T, N> weight(a.weight, a.shape.weight_element, c);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i)
    sum += pack.dout[i] * (weight.w[i] + a.shape.weight_offset) * pack.xhat(i, rstd, a.shape.casting);
  return sum;
}

// dx = rstd * (dxhat - xhat * mean(dxhat * xhat)) (+ dresidual)
template <typename T, int N>
HK_DEVICE void write_dx(const RmsNormBackward& a, const BackwardPack<T, N>& pack, float rstd, float mean, int64_t row,
                        int64_t c) {
  const WeightPack<T, N> weight(a.weight, a.shape.weight_element, c);
  Pack<T, N> dresidual{}, dx;
  if (a.dresidual != nullptr) dresidual = load<N>(static_cast<const T*>(a.dresidual) + row * a.dresidual_stride + c);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float dxhat = pack.dout[i] * (weight.w[i] + a.shape.weight_offset);
    const float value = rstd * (dxhat - pack.xhat(i, rstd, a.shape.casting) * mean);
    dx.set(i, a.dresidual != nullptr ? value + dresidual[i] : value);
  }
  store(static_cast<T*>(a.dx) + row * a.shape.dim + c, dx);
}

// dx alone. K = 0 as in the forward pass.
template <typename T, int N, int K>
__global__ void __launch_bounds__(row_threads(K)) rms_norm_dx_kernel(const RmsNormBackward a) {
  __shared__ float scratch[kWarp];
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int64_t begin = int64_t{threadIdx.x} * N, step = int64_t{blockDim.x} * N;
  const int64_t end = row < a.shape.num_rows ? a.shape.dim : 0;
  const float rstd = row < a.shape.num_rows ? a.rstd[row] : 0.0f;
  float sum = 0.0f;
  if constexpr (K > 0) {
    BackwardPack<T, N> held[K];
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (begin + k * step < end) held[k].load_from(a, row, begin + k * step);
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (begin + k * step < end) sum += pull_of(a, held[k], rstd, begin + k * step);
    const float mean = row_sum(sum, scratch) / static_cast<float>(a.shape.dim);
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (begin + k * step < end) write_dx(a, held[k], rstd, mean, row, begin + k * step);
  } else {
    BackwardPack<T, N> pack;
    for (int64_t c = begin; c < end; c += step) {
      pack.load_from(a, row, c);
      sum += pull_of(a, pack, rstd, c);
    }
    const float mean = row_sum(sum, scratch) / static_cast<float>(a.shape.dim);
    for (int64_t c = begin; c < end; c += step) {
      pack.load_from(a, row, c);
      write_dx(a, pack, rstd, mean, row, c);
    }
  }
}

constexpr int kFusedThreads = 512;  // leaves 128 registers a thread for a row, the next row and the sums

// dx and the sum of dweight over the block's run of rows, from one reading of x and dout; the next row is fetched while
// the threads of this one wait for each other. Rows that share the block are added up at its end.
template <typename T, int N, int K>
__global__ void __launch_bounds__(K == 1 ? kShortRowThreads : kFusedThreads)
    rms_norm_fused_backward_kernel(const RmsNormBackward a) {
  __shared__ float scratch[kWarp];
  __shared__ float rows_of_block[K == 1 ? kShortRowThreads * N : 1];
  const int64_t first = int64_t{blockIdx.x} * a.rows_per_sum, dim = a.shape.dim;
  const int64_t last = first + a.rows_per_sum < a.shape.num_rows ? first + a.rows_per_sum : a.shape.num_rows;
  const int64_t begin = int64_t{threadIdx.x} * N, step = int64_t{blockDim.x} * N;
  float dweight[K][N] = {};
  BackwardPack<T, N> next[K];
  float next_rstd = 0.0f;
  const auto fetch = [&](int64_t row) {
    next_rstd = row < last ? a.rstd[row] : 0.0f;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      next[k] = {};
      if (row < last && begin + k * step < dim) next[k].load_from(a, row, begin + k * step);
    }
  };
  fetch(first + threadIdx.y);
  for (int64_t base = first; base < last; base += blockDim.y) {
    const int64_t row = base + threadIdx.y;
    const float rstd = next_rstd;
    BackwardPack<T, N> held[K];
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < K; ++k) held[k] = next[k];
    fetch(row + blockDim.y);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (begin + k * step < dim) sum += pull_of(a, held[k], rstd, begin + k * step);
#pragma unroll
      for (int i = 0; i < N; ++i) dweight[k][i] += held[k].dout[i] * held[k].xhat(i, rstd, a.shape.casting);
    }
    const float mean = row_sum(sum, scratch) / static_cast<float>(dim);
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (row < last && begin + k * step < dim) write_dx(a, held[k], rstd, mean, row, begin + k * step);
  }
  if constexpr (K == 1) {
    if (blockDim.y > 1) {
      const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
      for (int i = 0; i < N; ++i) rows_of_block[thread * N + i] = dweight[0][i];
      __syncthreads();
      if (threadIdx.y != 0) return;
      for (unsigned y = 1; y < blockDim.y; ++y)
#pragma unroll
        for (int i = 0; i < N; ++i) dweight[0][i] += rows_of_block[(y * blockDim.x + threadIdx.x) * N + i];
    }
  }
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (begin + k * step < dim) a.sums[blockIdx.x * dim + begin + k * step + i] = dweight[k][i];
}

constexpr int kTileRows = 8;  // threads that share a column

// The sums of dweight alone: a block adds up 32 packs of columns over a run of rows.
template <typename T, int N>
__global__ void __launch_bounds__(kWarp* kTileRows) rms_norm_dweight_kernel(const RmsNormBackward a) {
  __shared__ float rows_of_block[kTileRows][kWarp * N];
  const int64_t first = int64_t{blockIdx.y} * a.rows_per_sum, dim = a.shape.dim;
  const int64_t last = first + a.rows_per_sum < a.shape.num_rows ? first + a.rows_per_sum : a.shape.num_rows;
  const int64_t c = (int64_t{blockIdx.x} * kWarp + threadIdx.x) * N;
  float dweight[N] = {};
  for (int64_t row = first + threadIdx.y; c < dim && row < last; row += kTileRows) {
    BackwardPack<T, N> pack;
    pack.load_from(a, row, c);
#pragma unroll
    for (int i = 0; i < N; ++i) dweight[i] += pack.dout[i] * pack.xhat(i, a.rstd[row], a.shape.casting);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) rows_of_block[threadIdx.y][threadIdx.x * N + i] = dweight[i];
  __syncthreads();
  if (threadIdx.y != 0 || c >= dim) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float sum = dweight[i];
    for (int y = 1; y < kTileRows; ++y) sum += rows_of_block[y][threadIdx.x * N + i];
    a.sums[blockIdx.y * dim + c + i] = sum;
  }
}

// Adds up the runs: out[c] = sum of sums[r][c] in a fixed order.
template <typename W>
__global__ void __launch_bounds__(kWarp* kTileRows)
    rms_norm_sum_runs_kernel(const float* sums, int64_t num_sums, int64_t dim, W* out) {
  __shared__ float parts[kTileRows][kWarp];
  const int64_t c = int64_t{blockIdx.x} * kWarp + threadIdx.x;
  float sum = 0.0f;
  if (c < dim)
    for (int64_t r = threadIdx.y; r < num_sums; r += kTileRows) sum += sums[r * dim + c];
  parts[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= dim) return;
  for (int y = 1; y < kTileRows; ++y) sum += parts[y][threadIdx.x];
  out[c] = from_float<W>(sum);
}

}  // namespace herdkern::cuda
