// Bulk copies, mbarriers and wgmma in one kernel, sound or with a fault: out = A B^T of 64 x n numbers by one
// warpgroup.
#include <exception>
#include <string>

#include "cuda/device.cuh"

// How an operand lies in its image, and how far 16 numbers of k are apart there.
struct Operand {
  int bytes, leading, stride, swizzle, mn_major, step;
};
struct Case {
  Operand a, b;
  int n, steps, fault;
};
enum Fault { kNone, kNoBarrierWait, kNoProductWait, kOddBytes, kTooFewBytes, kNoInit, kRegisters };

namespace herdkern::cuda {
namespace {

HK_DEVICE uint64_t descriptor_of(const unsigned char* image, const Operand& o, int step) {
  return ::simt::matrix_descriptor(image + step * o.step, o.leading, o.stride, ::simt::Swizzle(o.swizzle));
}

__global__ void product(const unsigned char* a, const unsigned char* b, const uint16_t* rows, float* out, Case c) {
  HK_DYNAMIC_SHARED(images);
  __shared__ uint64_t full;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  if (thread == 0 && c.fault != kNoInit) ::simt::mbarrier_init(&full, 1);
  __syncthreads();
  if (thread == 0) {
    ::simt::mbarrier_arrive_expect(&full, c.a.bytes + c.b.bytes + (c.fault == kTooFewBytes ? 16 : 0));
    ::simt::bulk_copy(images, a, c.a.bytes - (c.fault == kOddBytes ? 8 : 0), &full);
    ::simt::bulk_copy(images + c.a.bytes, b, c.b.bytes, &full);
  }
  if (c.fault != kNoBarrierWait) ::simt::mbarrier_wait(&full, 0);
  float d[128];
  for (int i = 0; i < c.n / 2; ++i) d[i] = -1.0f;
  for (int step = 0; step < c.steps; ++step) {
    const ::simt::Wgmma shape{c.n, ::simt::Half::kBfloat16, step > 0, c.a.mn_major != 0, c.b.mn_major != 0};
    const uint64_t right = descriptor_of(images + c.a.bytes, c.b, step);
    if (c.fault == kRegisters) {
      uint32_t left[4];
      for (int r = 0; r < 4; ++r) {
        const auto place = ::simt::place_in_a(lane, r, 0);
        const uint16_t* pair = rows + (16 * warp + place.row) * 16 * c.steps + 16 * step + place.column;
        left[r] = pair[0] | uint32_t{pair[1]} << 16;
      }
      ::simt::wgmma_registers(d, left, right, shape);
    } else {
      ::simt::wgmma(d, descriptor_of(images, c.a, step), right, shape);
    }
  }
  ::simt::wgmma_commit();
  if (c.fault != kNoProductWait) ::simt::wgmma_wait(0);
  for (int i = 0; i < c.n / 2; ++i) {
    const auto place = ::simt::place_in_c(lane, i % 4);
    out[(16 * warp + place.row) * c.n + 8 * (i / 4) + place.column] = d[i];
  }
}

std::string last_error;

}  // namespace
}  // namespace herdkern::cuda

extern "C" __attribute__((visibility("default"))) const char* run_product(const unsigned char* a,
                                                                          const unsigned char* b, const uint16_t* rows,
                                                                          float* out, const Case* c) {
  using namespace herdkern::cuda;
  last_error.clear();
  try {
    HK_LAUNCH(product, dim3(1), dim3(128), c->a.bytes + c->b.bytes, cudaStream_t{}, a, b, rows, out, *c);
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return last_error.c_str();
}
