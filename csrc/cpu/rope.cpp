#include "cpu/rope.h"

#include <algorithm>

#include "common/pair.h"
#include "cpu/huge_pages.h"
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

// What one token is turned by, in the order that the loops over heads want: cosines and sines with the sign of the
// direction. turn() has a fast form for whole Pairs; the plain one above takes any head_dim.
template <typename T>
class Turn {
 public:
  // rows: 2 * head_dim floats of this thread
  Turn(const Rope& args, float* rows)
      : args_(args),
        half_(args.head_dim / 2),
        cos_(rows),
        sin_(rows + args.head_dim),
        sign_(args.inverse ? -1.0f : 1.0f) {}

  static bool is_fast(const Rope& args) { return args.head_dim % (2 * Pair<T>::kSize) == 0; }

  void read_row(int64_t position) {
    const float* c = args_.cos_table + position * half_;
    const float* s = args_.sin_table + position * half_;
    if (args_.interleaved && kEvenOdd<T>) {  // a Pair holds the two coordinates of 16 pairs apart
      for (int64_t i = 0; i < half_; ++i) {
        cos_[i] = c[i];
        sin_[i] = sign_ * s[i];
      }
    } else if (args_.interleaved) {
      for (int64_t i = 0; i < half_; ++i) {
        cos_[2 * i] = cos_[2 * i + 1] = c[i];
        sin_[2 * i] = -sign_ * s[i];
        sin_[2 * i + 1] = sign_ * s[i];
      }
    } else {
      for (int64_t begin = 0; begin < half_; begin += Pair<T>::kSize)
        for (int i = 0; i < Pair<T>::kSize; ++i) {
          cos_[begin + Pair<T>::lane_of(i)] = c[begin + i];
          sin_[begin + Pair<T>::lane_of(i)] = sign_ * s[begin + i];
        }
    }
  }

  template <bool kStream>
  HK_INLINE void turn(const T* x, T* out) const {
    const auto write = [](const Pair<T>& y, T* p) { kStream ? y.stream(p) : y.store(p); };
    if (!args_.interleaved) {
      for (int64_t i = 0; i < half_; i += Pair<T>::kSize) {
        const Pair<T> a = Pair<T>::load(x + i), b = Pair<T>::load(x + half_ + i);
        const Pair<T> c = Pair<T>::load_lanes(cos_ + i), s = Pair<T>::load_lanes(sin_ + i);
        write(a * c - b * s, out + i);
        write(b * c + a * s, out + half_ + i);
      }
    } else {
      for (int64_t i = 0; i < args_.head_dim; i += Pair<T>::kSize) {
        const Pair<T> v = Pair<T>::load(x + i);
        if (kEvenOdd<T>) {
          const Vec c = Vec::load(cos_ + i / 2), s = Vec::load(sin_ + i / 2);
          write({v.a * c - v.b * s, v.b * c + v.a * s}, out + i);
        } else {
          const Pair<T> c = Pair<T>::load_lanes(cos_ + i), s = Pair<T>::load_lanes(sin_ + i);
          write(v * c + Pair<T>(swap_pairs(v.a), swap_pairs(v.b)) * s, out + i);
        }
      }
    }
  }

 private:
  const Rope& args_;
  const int64_t half_;
  float *const cos_, *const sin_;
  const float sign_;
};

template <typename T, bool kStream>
void turn_tokens_fast(const Rope& args, int64_t token_begin, int64_t token_end, float* rows) {
  Positions positions(args, token_begin);
  Turn<T> turn(args, rows);
  for (int64_t token = token_begin; token < token_end; ++token) {
    turn.read_row(positions.of(token));
    for (const RopeHeads& heads : args.heads) {
      const T* x = static_cast<const T*>(heads.x) + token * heads.token_stride;
      T* out = static_cast<T*>(heads.out) + token * heads.out_token_stride;
      for (int64_t head = 0; head < heads.num_heads; ++head, x += heads.head_stride, out += heads.out_head_stride)
        turn.template turn<kStream>(x, out);
    }
  }
  if (kStream) end_of_streams();
}

template <typename T>
void turn_tokens_plain(const Rope& args, int64_t token_begin, int64_t token_end, float* pairs) {
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

// Large results that lie apart from x go past the caches.
bool is_streamed(const Rope& args, int64_t element_size) {
  int64_t bytes = 0;
  for (const RopeHeads& heads : args.heads) {
    bytes += args.num_tokens * heads.num_heads * args.head_dim * element_size;
    if (heads.num_heads > 0 && (heads.out == heads.x || !is_line_aligned(heads.out))) return false;
  }
  return bytes >= kStreamBytes;
}

template <typename T>
void turn_tokens(const Rope& args, bool stream, int64_t token_begin, int64_t token_end, float* rows) {
  if (!Turn<T>::is_fast(args))
    turn_tokens_plain<T>(args, token_begin, token_end, rows);
  else if (stream)
    turn_tokens_fast<T, true>(args, token_begin, token_end, rows);
  else
    turn_tokens_fast<T, false>(args, token_begin, token_end, rows);
}

}  // namespace

void rope(const Rope& args) {
  const int64_t work = args.num_tokens * (args.heads[0].num_heads + args.heads[1].num_heads) * args.head_dim;
  const int num_threads = threads_for(work, args.num_threads);
  const int64_t rows_size = 2 * args.head_dim + 16;  // + a cache line between threads
  Workspace<float> rows(rows_size * num_threads);
  const int64_t element_size = args.is_bf16 ? sizeof(bf16) : sizeof(float);
  const bool stream = is_streamed(args, element_size);
  for (const RopeHeads& heads : args.heads)
    if (heads.out != heads.x)
      prefer_huge_pages(heads.out, args.num_tokens * heads.num_heads * args.head_dim * element_size);
  // As many parts as threads, so that each has its own rows.
  parallel_ranges(num_threads, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = args.num_tokens * part / num_threads, last = args.num_tokens * (part + 1) / num_threads;
      float* own = rows.data() + part * rows_size;
      args.is_bf16 ? turn_tokens<bf16>(args, stream, first, last, own)
                   : turn_tokens<float>(args, stream, first, last, own);
    }
  });
}

}  // namespace herdkern::cpu::HK_ISA
