// Backward pass, dsinks: one block a head adds up what its rows give, in a fixed order.
#pragma once
#include "cuda/attention_rows.cuh"

namespace herdkern::cuda {

// dsinks[h] = -sum_i exp(sinks[h] - lse_i) * delta_i.
__global__ void __launch_bounds__(1024) attention_sink_gradient_kernel(const AttentionBackward args) {
  __shared__ float sums[32];
  const int64_t head = blockIdx.x, total = args.shape.total_q;
  const float* lse = args.row_values + head * total;
  const float* delta = lse + args.shape.num_heads * total;
  const float sink = args.shape.sinks[head] * kLog2E;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < total; i += blockDim.x) sum = fmaf(exp2_approx(sink - lse[i]), delta[i], sum);
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  sum = warp_sum(threadIdx.x < blockDim.x / kWarp ? sums[threadIdx.x] : 0.0f);
  if (threadIdx.x == 0) args.dsinks[head] = -sum;
}

}  // namespace herdkern::cuda
