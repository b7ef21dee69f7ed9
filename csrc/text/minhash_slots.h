// From shingle hashes to slots, for each family of minhash.h. Compiled once per x86-64 level.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>

#include "text/minhash.h"

namespace herdkern::text::HK_MINHASH_LEVEL {

#if defined(__AVX512BW__)
constexpr int kVectorBytes = 64, kVectorsAtOnce = 8;  // 8 x (minimum, multiplier, offset) = 24 of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kVectorsAtOnce = 4;  // 12 of 16
#else
constexpr int kVectorBytes = 16, kVectorsAtOnce = 4;
#endif
constexpr int kLanes = kVectorBytes / 4, kWideLanes = kVectorBytes / 8;
typedef uint32_t Lanes __attribute__((vector_size(kVectorBytes)));
typedef uint64_t WideLanes __attribute__((vector_size(kVectorBytes)));

template <typename Vector, typename Number>
inline Vector load_lanes(const Number* from) {
  Vector v;
  std::memcpy(&v, from, kVectorBytes);
  return v;
}

// low: (kVectors * kLanes,), lowered to the slots of the `count` values at x.
template <int kVectors>
inline void lower_fast32(const uint32_t* x, int64_t count, const uint32_t* a, const uint32_t* b, uint32_t* minima) {
  Lanes low[kVectors], factor[kVectors], offset[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    low[v] = load_lanes<Lanes>(minima + v * kLanes);
    factor[v] = load_lanes<Lanes>(a + v * kLanes);
    offset[v] = load_lanes<Lanes>(b + v * kLanes);
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t value = x[i];
    for (int v = 0; v < kVectors; ++v) {
      const Lanes slot = factor[v] * value + offset[v];
      low[v] = slot < low[v] ? slot : low[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) std::memcpy(minima + v * kLanes, &low[v], kVectorBytes);
}

// The same for m61: 64-bit lanes whose lower halves are the slots. t mod (2^61 - 1) is t folded at bit 61, and 1 more
// than that with bit 61 cleared if it reaches 2^61 - 1; bit 61 does not matter mod 2^32.
template <int kVectors>
inline void lower_m61(const uint64_t* x, int64_t count, const uint64_t* a, const uint64_t* b, uint32_t* minima) {
  WideLanes low[kVectors], factor[kVectors], offset[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    for (int i = 0; i < kWideLanes; ++i) low[v][i] = minima[v * kWideLanes + i];
    factor[v] = load_lanes<WideLanes>(a + v * kWideLanes);
    offset[v] = load_lanes<WideLanes>(b + v * kWideLanes);
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t value = x[i];
    for (int v = 0; v < kVectors; ++v) {
      const WideLanes t = factor[v] * value + offset[v], folded = (t & kMersenne61) + (t >> 61);
      const WideLanes slot = (folded + ((folded + 1) >> 61)) & 0xFFFFFFFFu;
      low[v] = slot < low[v] ? slot : low[v];
    }
  }
  for (int v = 0; v < kVectors; ++v)
    for (int i = 0; i < kWideLanes; ++i) minima[v * kWideLanes + i] = static_cast<uint32_t>(low[v][i]);
}

// Calls lower(vectors, slot), where vectors is a constant of at most kMost.
template <int kMost, typename Lower>
inline void with_constant(int64_t vectors, int64_t slot, Lower& lower) {
  if constexpr (kMost > 1) {
    if (vectors < kMost) return with_constant<kMost - 1>(vectors, slot, lower);
  }
  lower(std::integral_constant<int, kMost>(), slot);
}

// Calls lower(vectors, first slot) for pieces of at most kVectorsAtOnce vectors of `lanes` slots.
template <typename Lower>
inline void for_slots(int64_t num_slots, int lanes, Lower&& lower) {
  for (int64_t slot = 0; slot < num_slots;) {
    const int64_t vectors = std::min<int64_t>((num_slots - slot) / lanes, kVectorsAtOnce);
    with_constant<kVectorsAtOnce>(vectors, slot, lower);
    slot += vectors * lanes;
  }
}

inline void lower_bins(const uint64_t* hashes, int64_t count, const SignPlan& plan, uint32_t* minima) {
  const uint64_t num_bins = plan.num_slots;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t hash = mix(hashes[i] ^ plan.salt);
    const uint64_t bin = (hash >> 32) * num_bins >> 32;
    minima[bin] = std::min(minima[bin], std::min(static_cast<uint32_t>(hash), kNoShingle - 1));
  }
}

// minima: (num_slots rounded up,), lowered. m61: hashes are of 64 bits as they are; fast32: their upper halves count.
inline void lower_slots(const uint64_t* hashes, int64_t count, const SignPlan& plan, Scratch& scratch,
                        uint32_t* minima) {
  if (plan.family == Family::kOph) return lower_bins(hashes, count, plan, minima);
  if (plan.family == Family::kM61) {
    return for_slots(plan.wide_multipliers.size(), kWideLanes, [&](auto vectors, int64_t slot) {
      lower_m61<decltype(vectors)::value>(hashes, count, &plan.wide_multipliers[slot], &plan.wide_offsets[slot],
                                          minima + slot);
    });
  }
  if (static_cast<int64_t>(scratch.reduced.size()) < count) scratch.reduced.resize(count);
  uint32_t* reduced = scratch.reduced.data();
  for (int64_t i = 0; i < count; ++i) reduced[i] = static_cast<uint32_t>(hashes[i] >> 32);
  for_slots(plan.multipliers.size(), kLanes, [&](auto vectors, int64_t slot) {
    lower_fast32<decltype(vectors)::value>(reduced, count, &plan.multipliers[slot], &plan.offsets[slot], minima + slot);
  });
}

// Gives every empty bin the value of the first bin in its order that is not empty. Either the order is followed, or,
// with few full bins, the one of least rank is looked for: at most num_slots^1.5 steps together.
inline void fill_empty_bins(const SignPlan& plan, Scratch& scratch, uint32_t* minima) {
  const int64_t num_bins = plan.num_slots;
  auto& full = scratch.places;
  full.clear();
  for (int64_t bin = 0; bin < num_bins; ++bin)
    if (minima[bin] != kNoShingle) full.push_back(static_cast<uint32_t>(bin));
  const int64_t num_full = full.size();
  if (num_full == 0 || num_full == num_bins) return;
  auto& before = scratch.reduced;
  before.assign(minima, minima + num_bins);
  for (int64_t bin = 0; bin < num_bins; ++bin) {
    if (before[bin] != kNoShingle) continue;
    if (num_full * num_full < num_bins) {
      const uint16_t* rank = &plan.bin_rank[bin * num_bins];
      uint32_t best = full[0];
      for (const uint32_t other : full) best = rank[other] < rank[best] ? other : best;
      minima[bin] = before[best];
    } else {
      const uint16_t* order = &plan.bin_order[bin * num_bins];
      while (before[*order] == kNoShingle) ++order;
      minima[bin] = before[*order];
    }
  }
}

}  // namespace herdkern::text::HK_MINHASH_LEVEL
