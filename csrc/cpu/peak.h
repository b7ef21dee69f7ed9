// The arithmetic peak of the processor: chains of one instruction on registers alone, no memory. What a kernel reaches
// of it is its distance from the machine's limit. benchmarks/ asks; no kernel does.
#pragma once

#include "cpu/isa.h"

namespace herdkern::cpu {

// kFma: fp32 multiply-add (baseline: a product and a sum).  kDot: vdpbf16ps.  kTile: tdpbf16ps.
enum class PeakKind : int { kFma = 0, kDot = 1, kTile = 2 };

}  // namespace herdkern::cpu

// GFLOP/s of num_threads threads together, of each the best of `trials` rounds of about half a millisecond (a product
// and a sum count 2); 0 where the level or the processor lacks the instruction.
HK_DECLARE_PER_LEVEL(double peak_gflop_per_s(PeakKind kind, int num_threads, int trials);)
