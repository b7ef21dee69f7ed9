// Kernels with one fault each, and the same without it: the emulator's negative controls. tests/cuda/test_simt.py says
// what each has to be stopped with. Plain C functions, called by ctypes.
#include <exception>
#include <string>

#include "cuda/device.cuh"

namespace herdkern::cuda {
namespace {

constexpr int kThreads = 64;

// out[i] = in[neighbour of i], through shared memory.
template <bool kBarrier>
__global__ void neighbour(const float* in, float* out, int distance) {
  __shared__ float held[kThreads];
  const int i = static_cast<int>(threadIdx.x);
  held[i] = in[i];
  if (kBarrier) __syncthreads();
  out[i] = held[(i + distance + kThreads) % kThreads];
}

// Sums of neighbours over `rounds` rounds: without the second barrier a fast warp overwrites what a slow one reads.
template <bool kSecondBarrier>
__global__ void rounds(const float* in, float* out, int num_rounds) {
  HK_DYNAMIC_SHARED(bytes);
  float* held = reinterpret_cast<float*>(bytes);
  const int i = static_cast<int>(threadIdx.x);
  float x = in[i];
  for (int round = 0; round < num_rounds; ++round) {
    held[i] = x;
    __syncthreads();
    x += held[(i + 33) % kThreads];
    if (kSecondBarrier) __syncthreads();
  }
  out[i] = x;
}

// The lanes of a warp exchange through shared memory.
template <bool kSync>
__global__ void within_warp(const float* in, float* out) {
  __shared__ float held[kThreads];
  const int i = static_cast<int>(threadIdx.x);
  held[i] = in[i];
  if (kSync) __syncwarp();
  out[i] = held[i ^ 1];
}

__global__ void divergent_sites(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1.0f;
}

__global__ void missing_lane(float* out) {
  float x = out[threadIdx.x];
  if (threadIdx.x != 5) x = __shfl_xor_sync(kAllLanes, x, 1);
  out[threadIdx.x] = x;
}

__global__ void ended_lane(float* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.0f, 1);
}

// A warp that waits at a named barrier for more threads than come.
__global__ void lonely_barrier(float* out) {
  if (threadIdx.x < 32) ::simt::sync_named(1, 64, {__FILE__, __LINE__});
  out[threadIdx.x] = 1.0f;
}

// One warp produces for the other: arrive and wait at named barriers in place of a full one.
template <bool kWaits>
__global__ void handed_over(const float* in, float* out) {
  __shared__ float held[32];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x < 32) {
    held[lane] = in[lane];
    ::simt::arrive_named(2, 64, {__FILE__, __LINE__});
  } else {
    if (kWaits) ::simt::sync_named(2, 64, {__FILE__, __LINE__});
    if (!kWaits) ::simt::arrive_named(2, 64, {__FILE__, __LINE__});
    out[lane] = held[31 - lane];
  }
}

// num_shared: floats that the launch gave.
__global__ void shared_end(float* out, int index) {
  HK_DYNAMIC_SHARED(bytes);
  reinterpret_cast<float*>(bytes)[index] = 1.0f;
  out[0] = 1.0f;
}

__global__ void global_index(const float* in, float* out, int index) { out[0] = in[index]; }

__global__ void wide_load(const float* in, float* out, int index) {
  const Pack<float, 4> pack = load<4>(in + index);
  out[0] = pack[0] + pack[3];
}

template <bool kWait>
__global__ void copied(const float* in, float* out) {
  __shared__ __align__(16) float held[4 * kThreads];
  const int i = static_cast<int>(threadIdx.x);
  ::simt::copy_async(held + 4 * i, in + 4 * i, 16, 16);
  ::simt::commit_copies();
  ::simt::copy_async(held + 4 * i, in + 4 * i, 16, 16);  // a second group, which nothing waits for
  ::simt::commit_copies();
  ::simt::wait_copies(kWait ? 0 : 2);
  __syncthreads();
  out[i] = held[4 * ((i + 1) % kThreads)];
}

template <bool kAtomic>
__global__ void counted(int* out) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (kAtomic) {
    atomicAdd(&count, 1);
  } else {
    count = count + 1;
  }
  __syncthreads();
  if (threadIdx.x == 0) *out = count;
}

__global__ void two_meetings(float* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned mask = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  float x = static_cast<float>(lane);
  for (int offset = 8; offset > 0; offset /= 2) x += __shfl_xor_sync(mask, x, offset);
  out[threadIdx.x] = x;
}

std::string last_error;

}  // namespace
}  // namespace herdkern::cuda

extern "C" __attribute__((visibility("default"))) const char* run_control(const char* name, const float* in, float* out,
                                                                          int number) {
  using namespace herdkern::cuda;
  const std::string asked = name;
  const dim3 one(1), block(kThreads);
  cudaStream_t none = nullptr;
  last_error.clear();
  try {
    if (asked == "neighbour") HK_LAUNCH((neighbour<true>), one, block, 0, none, in, out, number);
    if (asked == "neighbour without barrier") HK_LAUNCH((neighbour<false>), one, block, 0, none, in, out, number);
    if (asked == "many") HK_LAUNCH((neighbour<true>), dim3(64), block, 0, none, in, out, number);
    if (asked == "many without barrier") HK_LAUNCH((neighbour<false>), dim3(64), block, 0, none, in, out, number);
    if (asked == "rounds") HK_LAUNCH((rounds<true>), one, block, 256, none, in, out, number);
    if (asked == "rounds without second barrier") HK_LAUNCH((rounds<false>), one, block, 256, none, in, out, number);
    if (asked == "within warp") HK_LAUNCH((within_warp<true>), one, block, 0, none, in, out);
    if (asked == "within warp without sync") HK_LAUNCH((within_warp<false>), one, block, 0, none, in, out);
    if (asked == "divergent sites") HK_LAUNCH(divergent_sites, one, block, 0, none, out);
    if (asked == "missing lane") HK_LAUNCH(missing_lane, one, block, 0, none, out);
    if (asked == "ended lane") HK_LAUNCH(ended_lane, one, block, 0, none, out);
    if (asked == "lonely barrier") HK_LAUNCH(lonely_barrier, one, block, 0, none, out);
    if (asked == "handed over") HK_LAUNCH((handed_over<true>), one, block, 0, none, in, out);
    if (asked == "handed over without wait") HK_LAUNCH((handed_over<false>), one, block, 0, none, in, out);
    if (asked == "shared end") HK_LAUNCH(shared_end, one, block, 256, none, out, number);
    if (asked == "global index") HK_LAUNCH(global_index, one, block, 0, none, in, out, number);
    if (asked == "wide load") HK_LAUNCH(wide_load, one, block, 0, none, in, out, number);
    if (asked == "copied") HK_LAUNCH((copied<true>), one, block, 0, none, in, out);
    if (asked == "copied without wait") HK_LAUNCH((copied<false>), one, block, 0, none, in, out);
    if (asked == "counted") HK_LAUNCH((counted<true>), one, block, 0, none, reinterpret_cast<int*>(out));
    if (asked == "counted without atomic")
      HK_LAUNCH((counted<false>), one, block, 0, none, reinterpret_cast<int*>(out));
    if (asked == "two meetings") HK_LAUNCH(two_meetings, one, block, 0, none, out);
    if (asked == "too many threads") HK_LAUNCH(divergent_sites, one, dim3(2048), 0, none, out);
    if (asked == "too much shared") HK_LAUNCH(divergent_sites, one, block, 300 * 1024, none, out);
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return last_error.c_str();
}
