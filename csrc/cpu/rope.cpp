#include "cpu/rope.h"

#include <algorithm>

#include "common/simd.h"
#include "cpu/threads.h"
#include "cpu/workspace.h"

namespace herdkern::cpu::HK_ISA {
namespace {

// One head: the two halves of x are the two coordinates of the pairs. sign: 1 forward, -1 inverse.
template <typename T>
HK_INLINE void turn_halves(const T* x, const float* cos_row, const float* sin_row, float sign, int64_t half, T* out) {
  const Vec direction(sign);
  for_each_vec(
      half,
      [&](int64_t i) {
        const Vec a = Vec::load(x + i), b = Vec::load(x + half + i);
        const Vec c = Vec::load(cos_row + i), s = Vec::load(sin_row + i) * direction;
        (a * c - b * s).store(out + i);
        (b * c + a * s).store(out + half + i);
      },
      [&](int64_t i, int n) {
        const Vec a = Vec::load_partial(x + i, n), b = Vec::load_partial(x + half + i, n);
        const Vec c = Vec::load_partial(cos_row + i, n), s = Vec::load_partial(sin_row + i, n) * direction;
        (a * c - b * s).store_partial(out + i, n);
        (b * c + a * s).store_partial(out + half + i, n);
      });
}

// One head: neighbours are pairs. cos_pairs holds each cosine twice, sin_pairs each sine as (-sin, sin).
template <typename T>
HK_INLINE void turn_neighbours(const T* x, const float* cos_pairs, const float* sin_pairs, int64_t head_dim, T* out) {
  for_each_vec(
      head_dim,
      [&](int64_t i) {
        const Vec v = Vec::load(x + i);
        (v * Vec::load(cos_pairs + i) + swap_pairs(v) * Vec::load(sin_pairs + i)).store(out + i);
      },
      [&](int64_t i, int n) {
        const Vec v = Vec::load_partial(x + i, n);
        (v * Vec::load_partial(cos_pairs + i, n) + swap_pairs(v) * Vec::load_partial(sin_pairs + i, n))
            .store_partial(out + i, n);
      });
}

// The position of each token of an ascending run.
class Positions {
 public:
  Positions(const Rope& args, int64_t first_token) : args_(args) {
    if (args.positions == nullptr && args.cu_seqlens != nullptr)  // the first border after the token
      next_ = std::upper_bound(args.cu_seqlens, args.cu_seqlens + args.num_docs + 1, first_token);
  }

  HK_INLINE int64_t of(int64_t token) {
    if (args_.positions != nullptr)
      return args_.wide_positions ? static_cast<const int64_t*>(args_.positions)[token]
                                  : static_cast<const int32_t*>(args_.positions)[token];
    if (next_ == nullptr) return token;
    while (*next_ <= token) ++next_;  // the last border, num_tokens, lies above every token
    return token - next_[-1];
  }

 private:
  const Rope& args_;
  const int32_t* next_ = nullptr;
};

template <typename T>
void turn_tokens(const Rope& args, int64_t token_begin, int64_t token_end, float* pairs) {
  const int64_t half = args.head_dim / 2;
  const float sign = args.inverse ? -1.0f : 1.0f;
  Positions positions(args, token_begin);
  for (int64_t token = token_begin; token < token_end; ++token) {
    const int64_t position = positions.of(token);
    const float* cos_row = args.cos_table + position * half;
    const float* sin_row = args.sin_table + position * half;
    float* const cos_pairs = pairs;
    float* const sin_pairs = pairs + args.head_dim;
    for (int64_t i = 0; args.interleaved && i < half; ++i) {
      cos_pairs[2 * i] = cos_pairs[2 * i + 1] = cos_row[i];
      sin_pairs[2 * i] = -sign * sin_row[i];
      sin_pairs[2 * i + 1] = sign * sin_row[i];
    }
    for (const RopeHeads& heads : args.heads) {
      const T* x = static_cast<const T*>(heads.x) + token * heads.token_stride;
      T* out = static_cast<T*>(heads.out) + token * heads.out_token_stride;
      for (int64_t head = 0; head < heads.num_heads; ++head, x += heads.head_stride, out += heads.out_head_stride) {
        args.interleaved ? turn_neighbours(x, cos_pairs, sin_pairs, args.head_dim, out)
                         : turn_halves(x, cos_row, sin_row, sign, half, out);
      }
    }
  }
}

}  // namespace

void rope(const Rope& args) {
  const int64_t work = args.num_tokens * (args.heads[0].num_heads + args.heads[1].num_heads) * args.head_dim;
  const int num_threads = threads_for(work, args.num_threads);
  const int64_t pairs_size = (args.interleaved ? 2 * args.head_dim : 0) + 16;  // + a cache line between threads
  Workspace<float> pairs(pairs_size * num_threads);
  // As many parts as threads, so that each has its own pairs.
  parallel_ranges(num_threads, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = args.num_tokens * part / num_threads, last = args.num_tokens * (part + 1) / num_threads;
      float* own = pairs.data() + part * pairs_size;
      args.is_bf16 ? turn_tokens<bf16>(args, first, last, own) : turn_tokens<float>(args, first, last, own);
    }
  });
}

}  // namespace herdkern::cpu::HK_ISA
