#include "cpu/rms_norm.h"

#include "common/pair.h"
#include "cpu/huge_pages.h"
#include "cpu/threads.h"
#include "cpu/workspace.h"

namespace herdkern::cpu::HK_ISA {
namespace {

template <typename T>
float rounded_to(float x) {
  return to_float(from_float<T>(x));
}

template <typename T>
HK_INLINE const T* row_of(const void* data, int64_t row, int64_t stride) {
  return static_cast<const T*>(data) + row * stride;
}

// Sum of next(c) for the Pairs at c = 0, 32, ... and next_partial(c, n) for the rest, added up in the order of torch's
// sum over a contiguous dimension on x86: four chains of eight lanes, partial sums of 16, 256 and 4096 steps apart (it
// loses less, too); then the chains, the rest, the lanes. Below eight elements the chains are single.
template <typename T, typename Next, typename NextPartial>
HK_INLINE float sum_like_torch(int64_t dim, const Next& next, const NextPartial& next_partial) {
  constexpr int64_t kSteps = 16;
  const int64_t whole = dim / 32;
  Pair<T> level0(0.0f), level1(0.0f), level2(0.0f), level3(0.0f);
  int64_t step = 0;
  while (step + kSteps <= whole) {
    for (const int64_t end = step + kSteps; step < end; ++step) level0 += next(32 * step);
    level1 += level0;
    level0 = Pair<T>(0.0f);
    if (step % (kSteps * kSteps) != 0) continue;
    level2 += level1;
    level1 = Pair<T>(0.0f);
    if (step % (kSteps * kSteps * kSteps) != 0) continue;
    level3 += level2;
    level2 = Pair<T>(0.0f);
  }
  for (; step < whole; ++step) level0 += next(32 * step);
  level0 += level1;
  level0 += level2;
  level0 += level3;
  float sums[32], rest[32];
  level0.store_in_order(sums);
  const int num_rest = static_cast<int>(dim % 32);
  if (num_rest > 0) next_partial(32 * whole, num_rest).store_in_order(rest);
  if (dim < 8) {
    for (int i = 4; i < num_rest; ++i) rest[0] += rest[i];
    float total = rest[0];
    for (int i = 1; i < 4 && i < num_rest; ++i) total += rest[i];
    return total;
  }
  int i = 0;
  for (; i + 8 <= num_rest; i += 8)
    for (int lane = 0; lane < 8; ++lane) sums[lane] += rest[i + lane];
  for (int chain = 8; chain < 32; chain += 8)
    for (int lane = 0; lane < 8; ++lane) sums[lane] += sums[chain + lane];
  float total = 0.0f;
  for (; i < num_rest; ++i) total += rest[i];
  for (int lane = 0; lane < 8; ++lane) total += sums[lane];
  return total;
}

// weight + weight_offset as fp32 in the order of a Pair's lanes, zeros to the end of the last Pair.
template <typename T, typename W>
void fill_scale(const RmsNormShape& shape, const void* weight, float* scale) {
  const W* source = static_cast<const W*>(weight);
  for (int64_t c = 0; c < shape.dim; c += 32) {
    for (int i = 0; i < 32; ++i) {
      float value = c + i < shape.dim ? to_float(source[c + i]) : 0.0f;
      if (shape.casting == Casting::kNone) {
        value = rounded_to<T>(rounded_to<T>(value) + shape.weight_offset);
      } else {
        value += shape.weight_offset;
      }
      if (value != value) value = __builtin_nanf("");  // Pair's rounding wants a NaN with a low half of zeros
      scale[c + Pair<T>::lane_of(i)] = value;
    }
  }
}

template <typename T>
class Scale {
 public:
  Scale(const RmsNormShape& shape, const void* weight) : lanes_((shape.dim + 31) / 32 * 32) {
    if (shape.weight_element == Element::kFloat32) {
      fill_scale<T, float>(shape, weight, lanes_.data());
    } else {
      fill_scale<T, T>(shape, weight, lanes_.data());
    }
  }
  const float* data() const { return lanes_.data(); }

 private:
  Workspace<float> lanes_;
};

template <typename T, Casting kCasting>
HK_INLINE Pair<T> normed(const Pair<T>& h, const Pair<T>& rstd) {
  return kCasting == Casting::kGemma ? h * rstd : (h * rstd).rounded();
}

// kNone rounds every step to rstd, for the output alone: the gradient has the exact one.
template <typename T, Casting kCasting>
HK_INLINE float rstd_of_output(float mean, float rstd, float eps) {
  if (kCasting != Casting::kNone) return rstd;
  return rounded_to<T>(1.0f / std::sqrt(rounded_to<T>(rounded_to<T>(mean) + eps)));
}

template <typename T, Casting kCasting, bool kStream>
void forward_rows(const RmsNormForward& args, const float* scale, int64_t row_begin, int64_t row_end) {
  const int64_t dim = args.shape.dim;
  const bool adds = args.residual != nullptr;
  Workspace<T> streamed(adds && kStream ? dim : 0);  // the row of new_residual, which memory alone has otherwise
  const auto square = [](const Pair<T>& h) { return kCasting == Casting::kNone ? (h * h).rounded() : h * h; };
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* h = row_of<T>(args.x, row, args.x_stride);
    T* out = static_cast<T*>(args.out) + row * dim;
    float sum;
    if (adds) {
      const T *x = h, *residual = row_of<T>(args.residual, row, args.residual_stride);
      T *sums = static_cast<T*>(args.new_residual) + row * dim, *kept = kStream ? streamed.data() : sums;
      sum = sum_like_torch<T>(
          dim,
          [&](int64_t c) {
            const Pair<T> added = (Pair<T>::load(x + c) + Pair<T>::load(residual + c)).rounded();
            added.store(kept + c);
            if (kStream) added.stream(sums + c);
            return square(added);
          },
          [&](int64_t c, int n) {
            const Pair<T> added = (Pair<T>::load_partial(x + c, n) + Pair<T>::load_partial(residual + c, n)).rounded();
            added.store_partial(kept + c, n);
            if (kStream) added.store_partial(sums + c, n);
            return square(added);
          });
      h = kept;
    } else {
      sum = sum_like_torch<T>(
          dim, [&](int64_t c) { return square(Pair<T>::load(h + c)); },
          [&](int64_t c, int n) { return square(Pair<T>::load_partial(h + c, n)); });
    }
    const float mean = sum / static_cast<float>(dim);
    args.rstd[row] = 1.0f / std::sqrt(mean + args.eps);
    const Pair<T> rstd(rstd_of_output<T, kCasting>(mean, args.rstd[row], args.eps));
    const int64_t next = row + 1 < row_end ? row + 1 : row;
    const T *next_x = row_of<T>(args.x, next, args.x_stride),
            *next_residual =
                row_of<T>(adds ? args.residual : args.x, next, adds ? args.residual_stride : args.x_stride);
    for_each_pair(
        dim,
        [&](int64_t c) {
          prefetch_pair(next_x + c);
          if (adds) prefetch_pair(next_residual + c);
          const Pair<T> y = normed<T, kCasting>(Pair<T>::load(h + c), rstd) * Pair<T>::load_lanes(scale + c);
          kStream ? y.stream(out + c) : y.store(out + c);
        },
        [&](int64_t c, int n) {
          const Pair<T> y = normed<T, kCasting>(Pair<T>::load_partial(h + c, n), rstd) * Pair<T>::load_lanes(scale + c);
          y.store_partial(out + c, n);
        });
  }
  if (kStream) end_of_streams();
}

// Streams where rows begin on cache lines and results are too large for the caches.
template <typename T>
bool may_stream(const RmsNormShape& shape, const void* result, const void* other) {
  const int64_t row_bytes = shape.dim * static_cast<int64_t>(sizeof(T));
  return shape.num_rows * row_bytes >= kStreamBytes && row_bytes % 64 == 0 && is_line_aligned(result) &&
         is_line_aligned(other);
}

template <typename T, Casting kCasting>
void forward(const RmsNormForward& args) {
  const RmsNormShape& shape = args.shape;
  const int64_t elements = shape.num_rows * shape.dim;
  const bool streams = may_stream<T>(shape, args.out, args.new_residual);
  const Scale<T> scale(shape, args.weight);
  prefer_huge_pages(args.out, elements * static_cast<int64_t>(sizeof(T)));
  if (args.residual != nullptr) prefer_huge_pages(args.new_residual, elements * static_cast<int64_t>(sizeof(T)));
  parallel_ranges(shape.num_rows, threads_for(elements, shape.num_threads), [&](int64_t begin, int64_t end) {
    if (streams) {
      forward_rows<T, kCasting, true>(args, scale.data(), begin, end);
    } else {
      forward_rows<T, kCasting, false>(args, scale.data(), begin, end);
    }
  });
}

// With xhat = h * rstd: dh = rstd * (dout * scale - xhat * mean(dout * scale * xhat)), dweight = sum_rows(dout * xhat),
// with xhat as it was before any rounding. Rows go in groups, so that a piece of dweight_sum is fetched once for all of
// them: first the means, while the rows come from memory, then the results. dweight_sum: in the order of a Pair's
// lanes, added to; null: not wanted.
template <typename T>
class BackwardRows {
 public:
  static constexpr int kGroup = 2;
  BackwardRows(const RmsNormBackward& args, const float* scale, bool streams)
      : args_(args), scale_(scale), dim_(args.shape.dim), streams_(streams) {}

  void run(int64_t row_begin, int64_t row_end, float* dweight_sum) const {
    int64_t row = row_begin;
    for (; row + kGroup <= row_end; row += kGroup) group<kGroup>(row, dweight_sum);
    for (; row < row_end; ++row) group<1>(row, dweight_sum);
    if (streams_) end_of_streams();
  }

 private:
  template <int kRows>
  void group(int64_t row, float* dweight_sum) const {
    if (args_.dx == nullptr) return results<kRows, false, false>(row, nullptr, dweight_sum);
    float pull[kRows];
    for (int r = 0; r < kRows; ++r) pull[r] = pull_of(row + r);
    if (args_.dresidual != nullptr) {
      results<kRows, true, true>(row, pull, dweight_sum);
    } else {
      results<kRows, true, false>(row, pull, dweight_sum);
    }
  }

  // rstd^2 * mean(dout * scale * xhat) of one row: dh = rstd * dout * scale - that * h
  float pull_of(int64_t row) const {
    const T *dout = row_of<T>(args_.dout, row, args_.dout_stride), *x = row_of<T>(args_.x, row, args_.x_stride);
    Pair<T> total(0.0f);
    for_each_pair(
        dim_,
        [&](int64_t c) {
          total = fma(Pair<T>::load(dout + c) * Pair<T>::load_lanes(scale_ + c), Pair<T>::load(x + c), total);
        },
        [&](int64_t c, int n) {
          total = fma(Pair<T>::load_partial(dout + c, n) * Pair<T>::load_lanes(scale_ + c),
                      Pair<T>::load_partial(x + c, n), total);
        });
    const float rstd = args_.rstd[row];
    return sum(total.a + total.b) * rstd / static_cast<float>(dim_) * rstd * rstd;
  }

  template <int kRows, bool kWantsDx, bool kAdds>
  void results(int64_t first_row, const float* pull, float* dweight_sum) const {
    const int64_t whole = dim_ / 32 * 32;
    const int64_t ahead = first_row + 2 * kRows <= args_.shape.num_rows ? kRows : 0;
    for (int64_t c = 0; c < whole; c += 32) {
      Pair<T> dweight(0.0f);
      if (dweight_sum != nullptr) dweight = Pair<T>::load_lanes(dweight_sum + c);
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = first_row + r;
        const T* dout = row_of<T>(args_.dout, row, args_.dout_stride) + c;
        const T* x = row_of<T>(args_.x, row, args_.x_stride) + c;
        prefetch_pair(dout + ahead * args_.dout_stride);
        prefetch_pair(x + ahead * args_.x_stride);
        const Pair<T> g = Pair<T>::load(dout) * Pair<T>(args_.rstd[row]), h = Pair<T>::load(x);
        dweight = fma(g, h, dweight);
        if constexpr (kWantsDx) {
          Pair<T> d = fma(g, Pair<T>::load_lanes(scale_ + c), h * Pair<T>(-pull[r]));
          if constexpr (kAdds) d += Pair<T>::load(row_of<T>(args_.dresidual, row, args_.dresidual_stride) + c);
          T* dx = static_cast<T*>(args_.dx) + row * dim_ + c;
          streams_ ? d.stream(dx) : d.store(dx);
        }
      }
      if (dweight_sum != nullptr) dweight.store_lanes(dweight_sum + c);
    }
    const int n = static_cast<int>(dim_ - whole);
    if (n == 0) return;
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first_row + r;
      const Pair<T> dout = Pair<T>::load_partial(row_of<T>(args_.dout, row, args_.dout_stride) + whole, n);
      const Pair<T> g = dout * Pair<T>(args_.rstd[row]);
      const Pair<T> h = Pair<T>::load_partial(row_of<T>(args_.x, row, args_.x_stride) + whole, n);
      if (dweight_sum != nullptr) fma(g, h, Pair<T>::load_lanes(dweight_sum + whole)).store_lanes(dweight_sum + whole);
      if constexpr (kWantsDx) {
        Pair<T> d = fma(g, Pair<T>::load_lanes(scale_ + whole), h * Pair<T>(-pull[r]));
        if constexpr (kAdds)
          d += Pair<T>::load_partial(row_of<T>(args_.dresidual, row, args_.dresidual_stride) + whole, n);
        d.store_partial(static_cast<T*>(args_.dx) + row * dim_ + whole, n);
      }
    }
  }

  const RmsNormBackward& args_;
  const float* scale_;
  const int64_t dim_;
  const bool streams_;
};

template <typename T, typename W>
void write_dweight(const Workspace<float>& sums, int64_t num_blocks, int64_t dim, int num_threads, void* dweight) {
  const int64_t lanes = (dim + 31) / 32 * 32;
  parallel_ranges(lanes / 32, threads_for(num_blocks * dim, num_threads), [&](int64_t begin, int64_t end) {
    for (int64_t c = 32 * begin; c < 32 * end; c += 32) {
      Pair<T> total(0.0f);
      for (int64_t block = 0; block < num_blocks; ++block)
        total += Pair<T>::load_lanes(sums.data() + block * lanes + c);
      float in_order[32];
      total.store_in_order(in_order);
      for (int64_t i = 0; i < 32 && c + i < dim; ++i) static_cast<W*>(dweight)[c + i] = from_float<W>(in_order[i]);
    }
  });
}

// dweight is summed per block of rows, then over the blocks in order; the blocks depend on num_rows alone.
template <typename T>
void backward(const RmsNormBackward& args) {
  constexpr int64_t kMaxBlocks = 64, kMinRowsPerBlock = 16;
  const RmsNormShape& shape = args.shape;
  const int64_t num_rows = shape.num_rows, dim = shape.dim, lanes = (dim + 31) / 32 * 32;
  const int64_t even_share = (num_rows + kMaxBlocks - 1) / kMaxBlocks;
  const int64_t block_rows = even_share > kMinRowsPerBlock ? even_share : kMinRowsPerBlock;
  const int64_t num_blocks = (num_rows + block_rows - 1) / block_rows;
  const bool wants_dweight = args.dweight != nullptr;
  Workspace<float> sums(wants_dweight ? num_blocks * lanes : 0);
  const Scale<T> scale(shape, args.weight);
  if (args.dx != nullptr) prefer_huge_pages(args.dx, num_rows * dim * static_cast<int64_t>(sizeof(T)));
  const BackwardRows<T> rows(args, scale.data(), may_stream<T>(shape, args.dx, args.dx));
  const int num_threads = threads_for(num_rows * dim, shape.num_threads);
  parallel_ranges(num_blocks, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* block_sum = wants_dweight ? sums.data() + block * lanes : nullptr;
      if (wants_dweight) std::memset(block_sum, 0, static_cast<size_t>(lanes) * sizeof(float));
      const int64_t row_end = (block + 1) * block_rows;
      rows.run(block * block_rows, row_end < num_rows ? row_end : num_rows, block_sum);
    }
  });
  if (!wants_dweight) return;
  if (shape.weight_element == Element::kFloat32) {
    write_dweight<T, float>(sums, num_blocks, dim, num_threads, args.dweight);
  } else {
    write_dweight<T, T>(sums, num_blocks, dim, num_threads, args.dweight);
  }
}

template <typename T>
void forward_16bit(const RmsNormForward& args) {
  switch (args.shape.casting) {
    case Casting::kLlama:
      return forward<T, Casting::kLlama>(args);
    case Casting::kGemma:
      return forward<T, Casting::kGemma>(args);
    case Casting::kNone:
      return forward<T, Casting::kNone>(args);
  }
}

}  // namespace

void rms_norm_forward(const RmsNormForward& args) {
  if (args.shape.element == Element::kFloat32) return forward<float, Casting::kGemma>(args);
  args.shape.element == Element::kBfloat16 ? forward_16bit<bf16>(args) : forward_16bit<fp16>(args);
}

void rms_norm_backward(const RmsNormBackward& args) {
  if (args.shape.element == Element::kFloat32) return backward<float>(args);
  args.shape.element == Element::kBfloat16 ? backward<bf16>(args) : backward<fp16>(args);
}

}  // namespace herdkern::cpu::HK_ISA
