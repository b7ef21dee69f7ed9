// The kernel of rope.h: a thread turns the same P pairs in several heads of one token, for which it reads the table
// once.
#pragma once
#include "cuda/device.cuh"
#include "cuda/rope.h"

namespace herdkern::cuda {

constexpr int kRopeThreads = 256;  // at most, of a block
constexpr int kRopeHeads = 4;      // heads that a thread fetches before it turns them

// P pairs of a head: halves as two packs, neighbours as one of 2 P elements.
template <typename T, int P, bool kInterleaved>
struct Pairs {
  static constexpr int kPack = kInterleaved && P > 1 ? 2 * P : P;
  Pack<T, kPack> first, second;

  HK_DEVICE void load_from(const T* head, int64_t pair, int64_t half) {
    if constexpr (kInterleaved) {
      first = load<kPack>(head + 2 * pair);
      if constexpr (P == 1) second = load<kPack>(head + 2 * pair + 1);
    } else {
      first = load<kPack>(head + pair);
      second = load<kPack>(head + half + pair);
    }
  }
  HK_DEVICE void store_to(T* head, int64_t pair, int64_t half) const {
    if constexpr (kInterleaved) {
      store(head + 2 * pair, first);
      if constexpr (P == 1) store(head + 2 * pair + 1, second);
    } else {
      store(head + pair, first);
      store(head + half + pair, second);
    }
  }
  HK_DEVICE void turn(const float (&c)[P], const float (&s)[P]) {
    constexpr bool kOnePack = kInterleaved && P > 1;
#pragma unroll
    for (int i = 0; i < P; ++i) {
      const float a = kOnePack ? first[2 * i % kPack] : first[i], b = kOnePack ? first[(2 * i + 1) % kPack] : second[i];
      const float x = sub(mul(a, c[i]), mul(b, s[i])), y = add(mul(b, c[i]), mul(a, s[i]));
      if constexpr (kOnePack) {
        first.set(2 * i, x);
        first.set(2 * i + 1, y);
      } else {
        first.set(i, x);
        second.set(i, y);
      }
    }
  }
};

HK_DEVICE int64_t position_of(const Rope& a, int64_t token) {
  if (a.positions != nullptr)
    return a.wide_positions ? static_cast<const int64_t*>(a.positions)[token]
                            : static_cast<const int32_t*>(a.positions)[token];
  if (a.cu_seqlens == nullptr) return token;
  int64_t low = 0, high = a.num_docs - 1;  // the last document that begins at or before the token
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (a.cu_seqlens[middle] <= token)
      low = middle;
    else
      high = middle - 1;
  }
  return token - a.cu_seqlens[low];
}

// P values of a row of the table.
template <int P>
HK_DEVICE void load_table(const float* row, float (&values)[P]) {
  constexpr int kPart = P > 4 ? 4 : P;
#pragma unroll
  for (int part = 0; part < P / kPart; ++part) {
    const auto pack = load<kPart>(row + part * kPart);
#pragma unroll
    for (int i = 0; i < kPart; ++i) values[part * kPart + i] = pack[i];
  }
}

// threadIdx.x: which P pairs of a head; .y: which heads, every blockDim.y-th; .z: which token of the block.
template <typename T, int P, bool kInterleaved>
__global__ void __launch_bounds__(kRopeThreads) rope_kernel(const Rope a) {
  const int64_t token = int64_t{blockIdx.x} * blockDim.z + threadIdx.z, half = a.head_dim / 2;
  if (token >= a.num_tokens) return;
  const int64_t position = position_of(a, token), num_heads = a.q.num_heads + a.k.num_heads;
  const bool inside = position >= 0 && position < a.max_position;
  const auto head_of = [&](int64_t head, bool out) {
    const RopeHeads& x = head < a.q.num_heads ? a.q : a.k;
    const int64_t of_x = head < a.q.num_heads ? head : head - a.q.num_heads;
    return out ? static_cast<T*>(x.out) + token * x.out_stride + of_x * x.out_head_stride
               : static_cast<T*>(const_cast<void*>(x.x)) + token * x.x_stride + of_x * x.x_head_stride;
  };
  for (int64_t pair = int64_t{threadIdx.x} * P; pair < half; pair += int64_t{blockDim.x} * P) {
    float c[P], s[P];
    if (inside) {
      load_table(a.cos + position * half + pair, c);
      load_table(a.sin + position * half + pair, s);
    }
#pragma unroll
    for (int i = 0; i < P; ++i) {
      if (!inside) c[i] = s[i] = nanf("");
      if (a.inverse) s[i] = -s[i];
    }
    for (int64_t head = threadIdx.y; head < num_heads; head += int64_t{blockDim.y} * kRopeHeads) {
      Pairs<T, P, kInterleaved> held[kRopeHeads];
#pragma unroll
      for (int h = 0; h < kRopeHeads; ++h) {
        const int64_t at = head + int64_t{h} * blockDim.y;
        if (at < num_heads) held[h].load_from(head_of(at, false), pair, half);
      }
#pragma unroll
      for (int h = 0; h < kRopeHeads; ++h) {
        const int64_t at = head + int64_t{h} * blockDim.y;
        if (at >= num_heads) continue;
        held[h].turn(c, s);
        held[h].store_to(head_of(at, true), pair, half);
      }
    }
  }
}

}  // namespace herdkern::cuda
