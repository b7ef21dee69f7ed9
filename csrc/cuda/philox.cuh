// Philox4x32-10: four random words for every counter and seed. Source: Salmon et al. 2011
// (doi:10.1145/2063384.2063405).
#pragma once
#include "cuda/device.cuh"

namespace herdkern::cuda {

struct RandomWords {
  uint32_t w[4];
};

// Counter: (low and high half of index, step, stream).
HK_DEVICE RandomWords philox(uint64_t seed, uint64_t index, uint32_t step, uint32_t stream) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = step, c3 = stream;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(a);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// One of the eight 16-bit parts of a call.
HK_DEVICE uint32_t part_of(uint32_t word, int part) { return (word >> (part % 2 * 16)) & 0xffffu; }

// x to bf16, up with the probability of what is cut off: 16 random bits are added below the last one that is kept.
HK_DEVICE bf16 rounded_at_random(float x, uint32_t random) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const bool is_finite = (bits & 0x7f800000u) != 0x7f800000u;
  const uint32_t odd = (bits & 0x7fffffu) != 0 ? 0x400000u : 0u;  // a NaN stays one
  const uint16_t high = static_cast<uint16_t>((is_finite ? bits + random : bits | odd) >> 16);
  bf16 result;
  memcpy(&result, &high, sizeof result);
  return result;
}

}  // namespace herdkern::cuda
