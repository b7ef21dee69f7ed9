#include "cpu/peak.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <vector>

#include "common/simd.h"
#include "cpu/threads.h"
#ifdef HK_ISA_AMX
#include "cpu/amx_session.h"
#endif

namespace herdkern::cpu::HK_ISA {
namespace {

// Independent chains: enough to hide a latency of four at two instructions a cycle, few enough for the registers.
#if defined(HK_VEC_AVX512)
constexpr int kChains = 16;
#elif defined(HK_VEC_AVX2)
constexpr int kChains = 6;  // of two registers each
#else
constexpr int kChains = 3;  // of four
#endif

volatile float sink;  // without a reader the chains would be removed

// Flops of `steps` links of every chain. The sum is a factor of the next product, so nothing can be moved out of the
// loop, and the chains start apart, so none can be left out as the copy of another.
double run_fma(int64_t steps) {
  const volatile float half = 0.5f;  // not known when this is compiled
  const Vec a(half), b(half);
  Vec sums[kChains];
  float starts[16 * kChains];
  for (int i = 0; i < 16 * kChains; ++i) starts[i] = half * static_cast<float>(i);
  for (int i = 0; i < kChains; ++i) sums[i] = Vec::load(starts + 16 * i);
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sums[i] = fma(sums[i], a, b);
  Vec total(0.0f);
  for (const Vec& sum : sums) total = total + sum;
  float lanes[16];
  total.store(lanes);
  for (const float lane : lanes) sink = sink + lane;
  return 2.0 * 16 * kChains * static_cast<double>(steps);
}

#ifdef HK_VEC_AVX512
// Level avx512 does not imply the instruction, so the compiler is not asked for it.
double run_dot(int64_t steps) {
  __m512 sums[kChains], a = _mm512_set1_ps(0.0f), b = a;
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sums[i] = a;
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) __asm__ volatile("vdpbf16ps %1, %2, %0" : "+v"(sums[i]) : "v"(a), "v"(b));
  return 2.0 * 32 * kChains * static_cast<double>(steps);
}
#endif

#ifdef HK_ISA_AMX
double run_tile(int64_t steps) {
  const AmxSession session;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return 2.0 * 16 * 16 * 32 * 4 * static_cast<double>(steps);
}
#endif

double run(PeakKind kind, int64_t steps) {
  switch (kind) {
    case PeakKind::kFma:
      return run_fma(steps);
    case PeakKind::kDot:
#ifdef HK_VEC_AVX512
      if (has_avx512_bf16()) return run_dot(steps);
#endif
      return 0.0;
    case PeakKind::kTile:
#ifdef HK_ISA_AMX
      return run_tile(steps / 16);
#endif
      return 0.0;
  }
  return 0.0;
}

}  // namespace

// The threads run side by side, but each keeps the time of its own best round: on a busy machine all of them are seldom
// undisturbed at once.
double peak_gflop_per_s(PeakKind kind, int num_threads, int trials) {
  constexpr int64_t kSteps = 100000;
  std::vector<double> best(static_cast<size_t>(num_threads), 0.0);
  parallel_ranges(num_threads, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int trial = 0; trial < trials; ++trial) {
        const auto start = std::chrono::steady_clock::now();
        const double flops = run(kind, kSteps);
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        double& rate = best[static_cast<size_t>(thread)];
        rate = std::max(rate, flops / seconds / 1e9);
      }
  });
  return std::accumulate(best.begin(), best.end(), 0.0);
}

}  // namespace herdkern::cpu::HK_ISA
