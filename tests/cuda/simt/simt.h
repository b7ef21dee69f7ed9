// CUDA on a CPU, for tests: the very kernel sources that nvcc compiles, compiled by g++ -DHK_SIMT, run lane by lane.
// csrc/cuda/device.cuh includes this file in place of CUDA's headers; README.md of this folder says what is found, what
// is not, and what a kernel has to keep to.
#pragma once
#include <cstddef>
#include <cstdint>
#include <tuple>

#include "async.h"
#include "block.h"
#include "hopper.h"
#include "matrix.h"
#include "types.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// One block runs at a time on an OS thread, so its static shared variables are those of the OS thread; block.cpp
// poisons all thread-local storage of the kernel's library before each block.
#define __shared__ static thread_local
#define __constant__ static const

#define threadIdx (::simt::here->thread)
#define blockIdx (::simt::here->block)
#define blockDim (::simt::here->block_dim)
#define gridDim (::simt::here->grid_dim)
constexpr int warpSize = simt::kWarp;

typedef struct CUstream_st* cudaStream_t;

namespace simt {

template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Args... args) {
  const std::tuple<Params...> held(static_cast<Params>(args)...);
  launch(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
         std::function<void()>([&] { std::apply(kernel, held); }));
}

}  // namespace simt
