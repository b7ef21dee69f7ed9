// Shuffles and votes: the lanes of the mask meet, the last computes for all. A shuffle from a lane outside the mask is
// an error here, undefined on a GPU.
#pragma once
#include <string>

#include "block.h"

namespace simt {

// A shuffle's argument: the value brought and given back, and the lane that it comes from.
template <typename T>
struct Shuffled {
  T value;
  int source;
};

template <typename T>
inline T shuffle(unsigned mask, T value, int source, const char* what) {
  Shuffled<T> mine{value, source};
  meet_warp(
      mask, what,
      [](void* const* brought, unsigned met) {
        T out[kWarp];
        for (int i = 0; i < kWarp; ++i) {
          if (!(met >> i & 1)) continue;
          const int from = static_cast<Shuffled<T>*>(brought[i])->source;
          if (!(met >> from & 1))
            fail("a shuffle must read a lane of its mask, lane " + std::to_string(i) + " reads lane " +
                 std::to_string(from));
          out[i] = static_cast<Shuffled<T>*>(brought[from])->value;
        }
        for (int i = 0; i < kWarp; ++i)
          if (met >> i & 1) static_cast<Shuffled<T>*>(brought[i])->value = out[i];
      },
      &mine);
  return mine.value;
}

struct Vote {
  bool holds;
  unsigned ballot;
};

inline unsigned ballot(unsigned mask, bool holds, const char* what) {
  Vote mine{holds, 0};
  meet_warp(
      mask, what,
      [](void* const* brought, unsigned met) {
        unsigned all = 0;
        for (int i = 0; i < kWarp; ++i)
          if ((met >> i & 1) && static_cast<Vote*>(brought[i])->holds) all |= 1u << i;
        for (int i = 0; i < kWarp; ++i)
          if (met >> i & 1) static_cast<Vote*>(brought[i])->ballot = all;
      },
      &mine);
  return mine.ballot;
}

inline int lane() { return running_lane() % kWarp; }

}  // namespace simt

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = simt::kWarp) {
  const int lane = simt::lane();
  return simt::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), "__shfl_sync");
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = simt::kWarp) {
  const int lane = simt::lane(), from = lane ^ bits;
  return simt::shuffle(mask, value, from / width > lane / width ? lane : from, "__shfl_xor_sync");
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = simt::kWarp) {
  const int lane = simt::lane(), from = lane - int(delta);
  return simt::shuffle(mask, value, from < (lane & ~(width - 1)) ? lane : from, "__shfl_up_sync");
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = simt::kWarp) {
  const int lane = simt::lane(), from = lane + int(delta);
  return simt::shuffle(mask, value, from > (lane | (width - 1)) ? lane : from, "__shfl_down_sync");
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return simt::ballot(mask, predicate != 0, "__ballot_sync");
}
inline int __any_sync(unsigned mask, int predicate) { return simt::ballot(mask, predicate != 0, "__any_sync") != 0; }
inline int __all_sync(unsigned mask, int predicate) { return simt::ballot(mask, predicate == 0, "__all_sync") == 0; }
template <typename T>
inline unsigned __match_any_sync(unsigned mask, T value) {
  struct Match {
    T value;
    unsigned peers;
  } mine{value, 0};
  simt::meet_warp(
      mask, "__match_any_sync",
      [](void* const* brought, unsigned met) {
        for (int i = 0; i < simt::kWarp; ++i)
          for (int j = 0; j < simt::kWarp; ++j)
            if ((met >> i & 1) && (met >> j & 1) &&
                static_cast<Match*>(brought[i])->value == static_cast<Match*>(brought[j])->value)
              static_cast<Match*>(brought[i])->peers |= 1u << j;
      },
      &mine);
  return mine.peers;
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { simt::sync_warp(mask); }

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::sync_block(false, {file, line});
}
inline int __syncthreads_or(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return simt::sync_block(predicate != 0, {file, line}) != 0;
}
inline int __syncthreads_and(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return simt::sync_block(predicate == 0, {file, line}) == 0;
}
inline int __syncthreads_count(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return simt::sync_block(predicate != 0, {file, line});
}
