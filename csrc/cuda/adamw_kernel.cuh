// The kernels of adamw.h. A thread updates 8 consecutive elements at a time where addresses allow, else single ones.
#pragma once
#include "cuda/adamw.h"
#include "cuda/device.cuh"
#include "cuda/philox.cuh"

namespace herdkern::cuda {

constexpr int kAdamwThreads = 256, kAdamwPack = 8, kNormThreads = 1024;
constexpr int kRandomGroup = 128;  // elements that the 16 counters of a group round: element i takes counter i % 16

// N elements of any type from element i on, as fp32: in parts of 16 bytes.
template <int N, typename T>
HK_DEVICE void load_as_float(const T* p, float (&x)[N]) {
  constexpr int kPart = N == 1 ? 1 : 16 / sizeof(T);
#pragma unroll
  for (int part = 0; part < N / kPart; ++part) {
    const auto pack = load<kPart>(p + part * kPart);
#pragma unroll
    for (int i = 0; i < kPart; ++i) x[part * kPart + i] = pack[i];
  }
}
template <int N>
HK_DEVICE void load_as_float(const void* p, Element type, int64_t i, float (&x)[N]) {
  if (type == Element::kFloat32)
    load_as_float<N>(global(static_cast<const float*>(p)) + i, x);
  else if (type == Element::kBfloat16)
    load_as_float<N>(global(static_cast<const bf16*>(p)) + i, x);
  else
    load_as_float<N>(global(static_cast<const fp16*>(p)) + i, x);
}
template <int N, typename T>
HK_DEVICE void store_floats(T* p, const float (&x)[N]) {
  constexpr int kPart = N == 1 ? 1 : 16 / sizeof(T);
#pragma unroll
  for (int part = 0; part < N / kPart; ++part) {
    Pack<T, kPart> pack;
#pragma unroll
    for (int i = 0; i < kPart; ++i) pack.set(i, x[part * kPart + i]);
    store(p + part * kPart, pack);
  }
}
template <int N>
HK_DEVICE void store_floats(void* p, Element type, int64_t i, const float (&x)[N]) {
  if (type == Element::kFloat32)
    store_floats<N>(global(static_cast<float*>(p)) + i, x);
  else if (type == Element::kBfloat16)
    store_floats<N>(global(static_cast<bf16*>(p)) + i, x);
  else
    store_floats<N>(global(static_cast<fp16*>(p)) + i, x);
}

// The last row whose blocks begin at or before this block. Empty tensors have no block and are never found.
HK_DEVICE const AdamwRow& row_of_block(const AdamwRow* table, int64_t num_tensors) {
  int64_t low = 0, high = num_tensors - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (table[middle].first_block <= int64_t{blockIdx.x})
      low = middle;
    else
      high = middle - 1;
  }
  return table[low];
}

// The random part of each of 8 consecutive elements, number `first` (a multiple of 8) the first of them. The 16 threads
// of a group of 128 elements make one Philox call each and share its eight parts. `words`: of the thread's warp, padded
// against bank conflicts. All lanes of a warp call it, with a first that grows by 8 from lane to lane.
HK_DEVICE void random_parts(const Adamw& a, const AdamwRow& row, int64_t first, uint4* words, uint32_t (&parts)[8]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, of_group = lane % 16;
  const uint64_t group = static_cast<uint64_t>(first) / kRandomGroup;
  const RandomWords own = philox(a.seed, group * 16 + static_cast<uint64_t>(of_group), row.step, row.stream);
  __syncwarp();  // what the last call left has been read
  words[lane + lane / 8] = make_uint4(own.w[0], own.w[1], own.w[2], own.w[3]);
  __syncwarp();
  const int part = of_group / 2, source = lane / 16 * 16 + of_group % 2 * 8;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint4 of_source = words[source + i + (source + i) / 8];
    const uint32_t low = part / 2 % 2 == 0 ? of_source.x : of_source.y;
    const uint32_t high = part / 2 % 2 == 0 ? of_source.z : of_source.w;
    parts[i] = part_of(part < 4 ? low : high, part);
  }
}

HK_DEVICE uint32_t random_part(const Adamw& a, const AdamwRow& row, int64_t number) {
  const uint64_t index = static_cast<uint64_t>(number) / kRandomGroup * 16 + static_cast<uint64_t>(number) % 16;
  const int part = static_cast<int>(number % kRandomGroup) / 16;
  const RandomWords words = philox(a.seed, index, row.step, row.stream);
  const uint32_t low = part < 2 ? words.w[0] : words.w[1], high = part < 6 ? words.w[2] : words.w[3];
  return part_of(part < 4 ? low : high, part);
}

// Elements i to i + N - 1. at_random: the parameter is bf16 and rounded by `parts`.
template <int N>
HK_DEVICE void update(const AdamwRow& row, float grad_scale, int64_t i, bool at_random, const uint32_t (&parts)[N]) {
  float w[N], g[N], m[N], v[N];
  if (row.master != nullptr)
    load_as_float<N>(global(row.master) + i, w);
  else
    load_as_float<N>(row.param, row.param_type, i, w);
  load_as_float<N>(row.grad, row.grad_type, i, g);
  load_as_float<N>(global(row.exp_avg) + i, m);
  load_as_float<N>(global(row.exp_avg_sq) + i, v);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    g[j] = mul(g[j], grad_scale);
    m[j] = fmaf(row.lerp_weight, sub(g[j], m[j]), row.lerp_from_grad ? g[j] : m[j]);
    v[j] = fmaf(mul(row.one_minus_beta2, g[j]), g[j], mul(v[j], row.beta2));
    const float root = add(sqrtf(v[j]) / row.root_correction, row.eps);
    w[j] = add(mul(w[j], row.keep), mul(row.minus_step_size, m[j]) / root);
  }
  store_floats<N>(global(row.exp_avg) + i, m);
  store_floats<N>(global(row.exp_avg_sq) + i, v);
  if (row.master != nullptr) store_floats<N>(global(row.master) + i, w);
  if (at_random) {
    Pack<bf16, N> param;
#pragma unroll
    for (int j = 0; j < N; ++j) param.x[j] = rounded_at_random(w[j], parts[j]);
    store(global(static_cast<bf16*>(row.param)) + i, param);
  } else {
    store_floats<N>(row.param, row.param_type, i, w);
  }
}

__global__ void __launch_bounds__(kAdamwThreads) adamw_kernel(const Adamw a) {
  __shared__ uint4 words[kAdamwThreads / kWarp][kWarp + kWarp / 8];
  float scale = 1.0f;
  if (a.norm_and_scale != nullptr) {
    if (!isfinite(a.norm_and_scale[0])) return;
    scale = static_cast<float>(a.norm_and_scale[1]);
  }
  const AdamwRow row = row_of_block(a.table, a.num_tensors);
  scale *= row.grad_sign;
  const bool at_random = a.stochastic && row.master == nullptr && row.param_type == Element::kBfloat16;
  const int64_t begin = (int64_t{blockIdx.x} - row.first_block) * kAdamwBlock;
  const int64_t end = begin + kAdamwBlock < row.count ? begin + kAdamwBlock : row.count;
  const int64_t whole = row.is_aligned ? begin + (end - begin) / kAdamwPack * kAdamwPack : begin;
  for (int64_t base = begin; base < whole; base += kAdamwThreads * kAdamwPack) {
    const int64_t i = base + int64_t{threadIdx.x} * kAdamwPack;
    uint32_t parts[kAdamwPack] = {};
    if (at_random) random_parts(a, row, i, words[threadIdx.x / kWarp], parts);
    if (i < whole) update<kAdamwPack>(row, scale, i, at_random, parts);
  }
  for (int64_t i = whole + threadIdx.x; i < end; i += kAdamwThreads) {
    const uint32_t part[1] = {at_random ? random_part(a, row, i) : 0};
    update<1>(row, scale, i, at_random, part);
  }
}

// The sum over a block's threads in a fixed order, in thread 0; 0 in the others.
template <int kThreads>
HK_DEVICE double block_sum(double x, double* scratch) {
  scratch[threadIdx.x] = x;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < width) scratch[threadIdx.x] += scratch[threadIdx.x + width];
  }
  return threadIdx.x == 0 ? scratch[0] : 0.0;  // the others may come before the last addition
}

// Squares of N elements in fp32, whose fp64 is slow on most GPUs, and in fp64 where fp32 would lose or overflow.
template <int N>
HK_DEVICE double squares_of(const AdamwRow& row, int64_t i) {
  float x[N];
  load_as_float<N>(row.grad, row.grad_type, i, x);
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < N; ++j) sum = fmaf(x[j], x[j], sum);
  if (sum > 1e-30f && sum < 1e38f) return sum;
  double wide = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) wide += static_cast<double>(x[j]) * x[j];
  return wide;
}

__global__ void __launch_bounds__(kAdamwThreads) sum_squares_kernel(const GradNorm a) {
  __shared__ double scratch[kAdamwThreads];
  const AdamwRow row = row_of_block(a.table, a.num_tensors);
  const int64_t begin = (int64_t{blockIdx.x} - row.first_block) * kAdamwBlock;
  const int64_t end = begin + kAdamwBlock < row.count ? begin + kAdamwBlock : row.count;
  const int64_t whole = row.is_aligned ? begin + (end - begin) / kAdamwPack * kAdamwPack : begin;
  double sum = 0;
  for (int64_t i = begin + int64_t{threadIdx.x} * kAdamwPack; i < whole; i += kAdamwThreads * kAdamwPack)
    sum += squares_of<kAdamwPack>(row, i);
  for (int64_t i = whole + threadIdx.x; i < end; i += kAdamwThreads) sum += squares_of<1>(row, i);
  sum = block_sum<kAdamwThreads>(sum, scratch);
  if (threadIdx.x == 0) a.sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kNormThreads) norm_kernel(const GradNorm a) {
  __shared__ double scratch[kNormThreads];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < a.num_blocks; i += kNormThreads) sum += a.sums[i];
  sum = block_sum<kNormThreads>(sum, scratch);
  if (threadIdx.x != 0) return;
  const double norm = sqrt(sum), scale = a.max_grad_norm / (norm + 1e-6);  // as torch.nn.utils.clip_grad_norm_
  a.norm_and_scale[0] = norm;
  a.norm_and_scale[1] = scale < 1 ? scale : 1;
}

}  // namespace herdkern::cuda
