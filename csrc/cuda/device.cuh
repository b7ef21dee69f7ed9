// All that a kernel of csrc/cuda includes of CUDA: its names under nvcc; the same names from tests/cuda/simt/simt.h
// under g++ with -DHK_SIMT, which runs the threads of a block on the CPU. PTX beyond single numbers stands in mma.cuh.
//
// What simt.h declares, with CUDA's meaning: __global__, __device__, __host__, __forceinline__, __launch_bounds__,
// __shared__, threadIdx, blockIdx, blockDim, gridDim, dim3, uint2, uint4, float2, float4, cudaStream_t, __syncthreads,
// __syncwarp, __shfl_sync, __shfl_xor_sync, __shfl_down_sync, __ballot_sync, __nv_bfloat16, __half and their
// conversions __float2bfloat16_rn, __bfloat162float, __float2half_rn, __half2float; and, for this file,
// simt::launch(name, kernel, grid, block, shared_bytes, args...), simt::dynamic_shared(), simt::check_aligned(address,
// bytes).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef HK_SIMT
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#endif

#define HK_DEVICE __device__ __forceinline__
#ifndef HK_HOST_DEVICE
#define HK_HOST_DEVICE __host__ __device__
#endif

namespace herdkern::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifndef HK_SIMT
// Throws with CUDA's own words if the last call or launch failed.
inline void check(const char* what, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Dynamic shared memory above 48 KiB has to be asked for. Allocates nothing and waits for nothing: fit for a graph.
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Args... args) {
  if (shared_bytes > 48 * 1024)
    check(name, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared_bytes)));
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Params>(args)...);
  check(name, cudaGetLastError());
}
#endif

}  // namespace herdkern::cuda

// HK_LAUNCH((kernel<T, 4>), grid, block, shared_bytes, stream, args...): a kernel with template arguments stands in
// parentheses. HK_DYNAMIC_SHARED(name) declares the bytes that the launch gave the block, 128-byte aligned.
#ifdef HK_SIMT
#define HK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream), ::simt::launch(#kernel, kernel, grid, block, shared_bytes, __VA_ARGS__))
#define HK_DYNAMIC_SHARED(name) unsigned char* name = static_cast<unsigned char*>(::simt::dynamic_shared())
#else
#define HK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::herdkern::cuda::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define HK_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace herdkern::cuda {

HK_DEVICE float to_float(float x) { return x; }
HK_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
HK_DEVICE float to_float(fp16 x) { return __half2float(x); }

template <typename T>
HK_DEVICE T from_float(float x);
template <>
HK_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
HK_DEVICE bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
HK_DEVICE fp16 from_float<fp16>(float x) {
  return __float2half_rn(x);
}
// To T and back.
template <typename T>
HK_DEVICE float rounded_to(float x) {
  return to_float(from_float<T>(x));
}

// Products and sums that the compiler does not join to a multiply-add: where bits must be those of separate steps.
#ifdef HK_SIMT
HK_DEVICE float mul(float a, float b) { return a * b; }  // built with -ffp-contract=off
HK_DEVICE float add(float a, float b) { return a + b; }
HK_DEVICE float sub(float a, float b) { return a - b; }
HK_DEVICE float exp2_approx(float x) { return exp2f(x); }
HK_DEVICE float divide_approx(float a, float b) { return a / b; }
#else
HK_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
HK_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
HK_DEVICE float sub(float a, float b) { return __fsub_rn(a, b); }
// 2^x by the special function unit: relative error 2^-22, denormal results become 0.
HK_DEVICE float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// a / b to 2 units in the last place; 0 where |b| > 2^126.
HK_DEVICE float divide_approx(float a, float b) { return __fdividef(a, b); }
#endif

// N consecutive elements that move by one instruction: N * sizeof(T) is 2, 4, 8 or 16 and the address a multiple of it.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T x[N];
  HK_DEVICE float operator[](int i) const { return to_float(x[i]); }
  HK_DEVICE void set(int i, float value) { x[i] = from_float<T>(value); }
};

template <int N, typename T>
HK_DEVICE Pack<T, N> load(const T* p) {
#ifdef HK_SIMT
  ::simt::check_aligned(p, N * sizeof(T));
#endif
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
// To global memory. Left to itself the compiler stores some packs in parts.
template <typename T, int N>
HK_DEVICE void store(T* p, const Pack<T, N>& pack) {
#ifdef HK_SIMT
  ::simt::check_aligned(p, N * sizeof(T));
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
#else
  if constexpr (N * sizeof(T) == 16) {
    uint32_t words[4];
    memcpy(words, &pack, sizeof pack);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  } else {
    *reinterpret_cast<Pack<T, N>*>(p) = pack;
  }
#endif
}

// p, which the compiler may take for an address of global memory, as it takes those that a kernel was launched with.
template <typename T>
HK_DEVICE T* global(T* p) {
#ifndef HK_SIMT
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// Sum over groups of `width` neighbouring lanes (a power of two, at most 32), the same bits in each. All lanes call it.
HK_DEVICE float warp_sum(float x, int width = kWarp) {
  for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}
HK_DEVICE float warp_max(float x, int width = kWarp) {
  for (int offset = width / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

}  // namespace herdkern::cuda
